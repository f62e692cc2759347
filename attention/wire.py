"""What both ends of an attention worker's stream must agree on.

Messages are UTF-8 JSON. To the worker: {"submit": request} or {"cancel": id}. From it: {"updates": [...]}, all
updates of one step together, so that the cost of a message is paid once a step and not once a token.
"""

METHOD = "/shoal.Attention/Generate"
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
)


def identity(message: bytes) -> bytes:
    return message
