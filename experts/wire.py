"""What both ends of a gRPC stream must agree on, of rows to a host and of requests to an attention worker."""

METHOD = "/shoal.Experts/Forward"
TOKEN_KEY = "shoal-token"


def channel_options(max_message_bytes: int) -> tuple[tuple[str, int], ...]:
    """Of a channel or a server whose messages are at most so long."""
    return (
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.so_reuseport", 0),  # two servers never share a port
    )


OPTIONS = channel_options((1 << 30) + 4096)


def identity(message: bytes) -> bytes:
    """gRPC's serialiser of messages that are bytes already."""
    return message
