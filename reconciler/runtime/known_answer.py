"""
The known answer of a model: what is recorded on one machine before a network signs, and compared with what another machine computes.

Rules that hold here:

1. The recorded tokens are fed one by one (teacher forcing), never the model's own. After one close choice that falls otherwise, all that a
   model generates differs; with the recorded tokens as its input it is asked the same question at every position.
2. Compared is the model's first choice, only at the positions that are named as sure: there the recorder's first choice led the second by
   ``MARGIN`` or more. Another choice contradicts the answer where it leads the recorded token by as much, or where there are others at more
   than one position in fifty, and at two: rounding moves a few leads by more than the margin, and would fail a sound model.
   A recording has at least ``LEAST_TOKENS`` tokens and ``LEAST_SURE`` such positions, or there is none; as many tokens as the test job
   generates, if those are more.
3. The prompt is compared before, as token ids. Where another tokenizer splits it otherwise, the engine is at fault, not the model: the
   test could not be made, and is reported as that.
4. What was compared is counted. Where nothing was, nothing is said to agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from reconciler.core import units
from reconciler.core.snapshot import ANSWER_VERSION, LEAST_SURE, LEAST_TOKENS
from reconciler.runtime import llama_cpp_files
from reconciler.runtime.result import BadModel, CannotTest

#: Logits by which a first choice must lead the second to be compared on other devices.
#:
#: Devices, thread counts, batch sizes and instruction sets add the same products in another order, and a quantised product rounds its
#: inputs too. A first choice changes only where the difference between two logits moves by more than its lead. Measured by
#: ``benchmarks/known_answers.py`` (figures in ``benchmarks/RESULTS.md``): the real gemma-3-270m (4 to 8 bits), random prompts,
#: llama.cpp under 1 and 2 threads, batches of 1, 32 and 512, with AVX-512 and without AVX, 202 prompts each. With AVX-512 the largest lead
#: at which a first choice was another is 0.55. Without AVX it was another at two of 3,909 sure positions, recorded with leads of 2.48 and
#: 3.56: there it led by 0.33 and 0.71, where the same asked of the other side would be 1.0. Others report a CPU and CUDA to part at 0.24.
#: It is a measured bound for models like that one, not a proof: logits have no unit, and a model with larger ones has larger leads and
#: errors.
MARGIN = 1.0
#: Tokens at which a recording gives up: a model that is never sure has no answer that devices agree on.
MOST_TOKENS = 256

#: Ends the job when its time is over; is given how many tokens were computed.
Late = Callable[[int], None]


class Choice(NamedTuple):
    """What the model would say next: its first choice, by how many logits that leads the second, and its likeliest that ends nothing."""

    token: int
    lead: float
    goes_on: int


class Recording(NamedTuple):
    """A recorded answer, as a snapshot holds it, and the choice that the model made at each of its tokens."""

    answer: dict[str, Any]
    choices: list[Choice]


class Reader:
    """Feeds tokens to *model*, a ``llama_cpp.Llama``, after its prompt, and reads its choices."""

    def __init__(self, llama_cpp: Any, model: Any, prompt: Sequence[int]) -> None:
        self._llama_cpp, self._model = llama_cpp, model
        model.reset()
        model.eval(prompt)

    def choice(self) -> Choice:
        """
        Return the model's choice after what it was fed.

        Raises:
            BadModel: its logits are not finite numbers.
        """
        import numpy as np

        logits = self._logits()
        second, first = np.partition(logits, -2)[-2:]
        chosen = int(logits.argmax())
        return Choice(chosen, float(first - second), chosen if not self._ends(chosen) else self._goes_on(logits))

    def lead_over(self, token: int) -> tuple[int, float]:
        """Return the model's first choice, and by how many logits it leads *token*; raises as ``choice``."""
        logits = self._logits()
        chosen = int(logits.argmax())
        return chosen, float(logits[chosen] - logits[token])

    def _logits(self) -> Any:
        import numpy as np

        size = self._model.n_vocab()
        llama_cpp_files.refuse_nonfinite(self._llama_cpp, self._model.ctx, size)
        return np.ctypeslib.as_array(self._llama_cpp.llama_get_logits_ith(self._model.ctx, -1), shape=(size,))

    def feed(self, token: int) -> None:
        """Let the model read *token*."""
        self._model.eval([token])

    def _goes_on(self, logits: Any) -> int:
        import numpy as np

        return next((int(token) for token in np.argsort(logits)[::-1] if not self._ends(token)), int(np.argmax(logits)))

    def _ends(self, token: int) -> bool:
        vocabulary = self._model._model.vocab  # noqa: SLF001  the binding has no public name for it
        return bool(self._llama_cpp.llama_vocab_is_eog(vocabulary, int(token)))


def record(llama_cpp: Any, model: Any, prompt: Sequence[int], late: Late, *, tokens: int = LEAST_TOKENS) -> Recording:
    """
    Return what *model* answers to *prompt*: until enough positions are sure, and at least ``LEAST_TOKENS`` tokens, and *tokens*.

    Where it would end the answer, its likeliest other token is recorded and fed, and the position is not compared: what follows an end
    says little, and a model repeats it for ever.

    Raises:
        CannotTest: it is not sure often enough, or its context is too small.
    """
    reader, choices, sure = Reader(llama_cpp, model, prompt), list[Choice](), list[int]()
    least = max(LEAST_TOKENS, tokens)
    room = min(max(MOST_TOKENS, tokens), model.n_ctx() - len(prompt))
    while len(choices) < least or len(sure) < LEAST_SURE:
        if len(choices) >= room:
            raise CannotTest(_too_little(len(choices), len(sure)))
        choice = reader.choice()
        if choice.lead >= MARGIN and choice.token == choice.goes_on:
            sure.append(len(choices))
        choices.append(choice)
        reader.feed(choice.goes_on)
        late(len(choices))
    answer = [choice.goes_on for choice in choices]
    return Recording({"tokens": answer, "sure": sure, "prompt": list(prompt), "margin": MARGIN, "version": ANSWER_VERSION}, choices)


def _too_little(tokens: int, sure: int) -> str:
    return (
        f"too little to compare: in {units.count(tokens, 'token')} its first choice leads by {MARGIN} logits at {sure}, and {LEAST_TOKENS} "
        f"tokens with {LEAST_SURE} such positions are the least; a longer or plainer prompt may have more"
    )


def compare(llama_cpp: Any, model: Any, prompt: Sequence[int], answer: dict[str, Any], late: Late) -> int:
    """
    Feed the recorded tokens of *answer* after *prompt* and return at how many positions the first choice was compared.

    Raises:
        CannotTest: the engine's tokenizer splits the prompt otherwise.
        BadModel: its first choices contradict the answer (rule 2).
    """
    refuse_other_prompt(prompt, answer)
    if (wrong := max(answer["tokens"])) >= model.n_vocab():
        raise BadModel(f"its answer is recorded with token {wrong:,}, and it has {model.n_vocab():,} tokens")
    reader, sure, others, leads = Reader(llama_cpp, model, prompt), frozenset(answer["sure"]), list[str](), list[float]()
    for position, token in enumerate(answer["tokens"]):
        chosen, lead = reader.lead_over(token) if position in sure else (token, 0.0)
        if lead > 0:
            leads.append(lead)
            others.append(f"at position {position} it chooses token {chosen} by {lead:.2f} logits, recorded is {token}")
        reader.feed(token)
        late(position)
    if contradicts(leads, len(sure)):
        raise BadModel(f"{ANOTHER}: {others[leads.index(max(leads))]}; {len(others)} of {units.count(len(sure), 'position')} differ")
    return len(sure)


def contradicts(leads: Sequence[float], sure: int) -> bool:
    """Whether first choices that lead the recorded tokens by *leads*, at as many of *sure* positions, are another answer (rule 2)."""
    return any(lead >= MARGIN for lead in leads) or len(leads) > max(1, sure // _ONE_IN)


#: One in so many sure positions may have another first choice, which does not lead by the margin, and one in any case.
_ONE_IN = 50

#: How the reason begins where a model, or what runs it, is not what it was where the answer was recorded.
ANOTHER = "it computes another answer than the network signed"


def refuse_other_prompt(prompt: Sequence[int], answer: dict[str, Any]) -> None:
    """
    Check that the prompt is split into the tokens that were recorded, if they were.

    Raises:
        CannotTest: it is not.
    """
    recorded = answer.get("prompt")
    if not recorded or list(recorded) == list(prompt):
        return
    place = next((i for i, (a, b) in enumerate(zip(prompt, recorded, strict=False)) if a != b), min(len(prompt), len(recorded)))
    raise CannotTest(
        f"this engine's tokenizer splits the prompt otherwise than the one that recorded its answer: into {len(prompt)} tokens, "
        f"not {len(recorded)}, the first other one at position {place}"
    )


def embedding(vector: list[float], prompt: Sequence[int] = ()) -> dict[str, Any]:
    """Return *vector*, the embedding of *prompt*, as a snapshot holds it; a server does not tell the prompt's tokens."""
    return {"embedding": vector, "version": ANSWER_VERSION} | ({"prompt": list(prompt)} if prompt else {})


def compare_embedding(vector: list[float], smoke: dict[str, Any]) -> int:
    """
    Compare an embedding with the recorded one, if the snapshot has one; return 1 where it was compared, else 0.

    Raises:
        BadModel: they point in other directions, or are of different length.
    """
    answer = smoke["expect"].get("answer")
    if not answer:
        return 0
    recorded = answer["embedding"]
    if not recorded:
        raise BadModel("tokens are expected of it, and it is asked for an embedding")
    if len(vector) != len(recorded):
        raise BadModel(f"{ANOTHER}: an embedding of {len(vector)} components, the recorded one has {len(recorded)}")
    length = math.hypot(*vector) * math.hypot(*recorded)
    cosine = sum(a * b for a, b in zip(vector, recorded, strict=True)) / length if length else 0.0
    if not cosine >= answer["cosine"]:
        raise BadModel(f"{ANOTHER}: the cosine to its embedding is {cosine:.6f}, expected at least {answer['cosine']}")
    return 1
