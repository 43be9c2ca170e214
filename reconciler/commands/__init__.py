"""
The composition root: settings in, ports wired, one function for each thing that a person can ask for.

``confirm`` turns files into a lock that may be acted on, ``network`` hears snapshots and roots, ``wiring`` joins adapters to ports,
``run`` is plan, apply and sync, ``look`` is what reads, ``upkeep`` what tidies, ``agent`` what repeats, ``doctor`` what examines.
Only this package knows adapters; each is imported when it is used, so that a plan loads no downloader and no engine.
"""
