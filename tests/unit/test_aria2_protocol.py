"""aria2's control file, as it is written for a file that is to be continued; and the prefix that a bitfield stands for."""

from __future__ import annotations

import struct

import pytest

from reconciler.fetch import aria2_protocol
from reconciler.fetch.aria2_protocol import prefix
from reconciler.fetch.settings import FetchSettings
from reconciler.fetch.staging import piece_length

MIB = 1 << 20
BLOCK = aria2_protocol.BLOCK


def test_a_whole_file_is_whole() -> None:
    size = 3 * MIB + 5
    assert aria2_protocol.total_bytes(aria2_protocol.kept_ranges([(0, size)], "f0", MIB, size, 4096)) == size


def test_nothing_is_nothing() -> None:
    assert aria2_protocol.total_bytes(aria2_protocol.kept_ranges([], "", MIB, 3 * MIB, 4096)) == 0


def test_the_front_is_kept_up_to_the_end_of_the_file() -> None:
    end = MIB + 5 * BLOCK + 100
    found = aria2_protocol.kept_ranges([(0, end)], "8", MIB, 3 * MIB, 4096)
    assert found == [[(0, MIB)], [(MIB, MIB + 5 * BLOCK)], []]


def test_before_a_hole_the_granularity_is_taken_off() -> None:
    found = aria2_protocol.kept_ranges([(0, 4 * BLOCK + 4096), (MIB, MIB + BLOCK)], "", MIB, 3 * MIB, 4096)
    assert found[0] == [(0, 4 * BLOCK)]
    found = aria2_protocol.kept_ranges([(0, 4 * BLOCK), (MIB, MIB + BLOCK)], "", MIB, 3 * MIB, 4096)
    assert found[0] == [(0, 3 * BLOCK)]
    assert found[1] == [(MIB, MIB + BLOCK)]


def test_where_pieces_run_into_each_other_the_last_block_is_fetched_again_unless_it_was_reported() -> None:
    runs = [(0, 2 * MIB + BLOCK)]
    assert aria2_protocol.kept_ranges(runs, "", MIB, 3 * MIB, 4096)[:2] == [[(0, MIB - BLOCK)], [(MIB, 2 * MIB - BLOCK)]]
    assert aria2_protocol.kept_ranges(runs, "8", MIB, 3 * MIB, 4096)[:2] == [[(0, MIB)], [(MIB, 2 * MIB - BLOCK)]]


def test_a_report_of_what_the_file_does_not_reach_is_not_believed() -> None:
    assert aria2_protocol.kept_ranges([(0, BLOCK)], "ff", MIB, 3 * MIB, 4096) == [[(0, BLOCK)], [], []]


def test_a_coarse_file_system_loses_more() -> None:
    found = aria2_protocol.kept_ranges([(0, 2 * BLOCK), (10 * BLOCK, 20 * BLOCK)], "", MIB, MIB, 2 * BLOCK)
    assert found == [[(12 * BLOCK, 20 * BLOCK)]]


def test_the_file_that_aria2_reads() -> None:
    size = 2 * MIB + 100
    data = aria2_protocol.control_file([[(0, MIB)], [(MIB + BLOCK, MIB + 3 * BLOCK)], [(2 * MIB, size)]], MIB, size)
    head = struct.unpack(">HIIIQQI", data[:34])
    assert head == (1, 0, 0, MIB, size, 0, 1)
    assert data[34] == 0b10100000
    assert struct.unpack(">IIII", data[35:51]) == (1, 1, MIB, 8)
    assert data[51:] == bytes([0b01100000, 0, 0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("bitfield", "expected"), [("", 0), ("0", 0), ("8", 1), ("c", 2), ("e", 3), ("f", 4), ("f7", 4), ("fe", 7), ("ff", 8), ("7f", 0)]
)
def test_the_unbroken_front_of_a_bitfield(bitfield: str, expected: int) -> None:
    assert prefix(bitfield, 10, 1000) == expected * 10
    assert prefix(bitfield, 10, 15) == min(15, expected * 10)
    assert all(aria2_protocol.is_set(bitfield, index) for index in range(expected))
    assert not aria2_protocol.is_set(bitfield, expected)


def test_pieces_are_few_enough_to_report_and_enough_for_all_connections() -> None:
    assert piece_length(1) == MIB
    assert piece_length(63 * MIB) == MIB
    assert piece_length(256 * MIB) == 8 * MIB
    assert piece_length(16 << 30) == 8 * MIB
    for size in (1 << 36, 1 << 40):
        assert size / piece_length(size) <= 16384


def test_a_file_among_others_comes_over_fewer_connections_than_one_alone() -> None:
    settings = FetchSettings(connections=8)

    assert [aria2_protocol.connections(settings, size * MIB) for size in (4, 24, 48, 1024)] == [4, 4, 8, 8]
    assert [aria2_protocol.connections(settings, size * MIB, among_others=True) for size in (4, 24, 48, 1024)] == [1, 1, 2, 8]
