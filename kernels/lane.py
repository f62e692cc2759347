"""The ends of a lane, which is memory that two processes map, as the native code has them (`kernels/csrc/lane.h`)."""

import ctypes

MOST_SLOTS = 16
LEG = 6
"""Numbers that a dispatch has of each host: slot, correlation, generation; and once sent, the first of its slots among
those kept, how many they are, and rows."""


class NativeLane(ctypes.Structure):
    """Addresses of lines and slots: the peer's, then ours."""

    _fields_ = (
        ("out_lines", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("in_lines", ctypes.c_void_p),
        ("in_", ctypes.c_void_p),
        ("out_slot_bytes", ctypes.c_long),
        ("in_slot_bytes", ctypes.c_long),
        ("slots", ctypes.c_long),
        ("bell", ctypes.c_void_p),
        ("over", ctypes.c_long),
        ("seen", ctypes.c_uint64 * MOST_SLOTS),
    )


class Asked(ctypes.Structure):
    """What came in a slot. `whole`: it is a forward request as long as its tensors, and the rest was read from it."""

    _fields_ = (
        ("lane", ctypes.c_long),
        ("slot", ctypes.c_long),
        ("length", ctypes.c_long),  # below 0 where a peer announced more than that
        ("correlation", ctypes.c_uint64),
        ("whole", ctypes.c_long),
        ("layer", ctypes.c_long),
        ("generation", ctypes.c_long),
        ("rows", ctypes.c_long),
        ("pairs", ctypes.c_long),
        ("hidden", ctypes.c_long),
    )
    lane: int
    slot: int
    length: int
    correlation: int
    whole: int
    layer: int
    generation: int
    rows: int
    pairs: int
    hidden: int
