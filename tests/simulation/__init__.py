"""The whole service in one process under a virtual clock: real host, client, engine, replay and conductor; faked world.

`python -m tests.simulation --seeds 1000` runs seeds; a seed replays exactly.
"""
