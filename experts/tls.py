"""TLS between nodes: file names in, gRPC credentials out."""

from dataclasses import dataclass
from pathlib import Path

import grpc


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. Both sides present `certificate` and accept a peer signed by `root`."""

    certificate: Path
    key: Path
    root: Path
    name: str | None = None  # in every certificate; without it, each must name the address that its node listens on

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Contents of (key, certificate, root); raises ValueError that names an unreadable file."""
        contents: list[bytes] = []
        for path in (self.key, self.certificate, self.root):
            try:
                contents.append(Path(path).read_bytes())
            except OSError as error:
                raise ValueError(f"TLS file {path}: {error.strerror}; give a readable PEM file") from error
        return contents[0], contents[1], contents[2]


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials of a server that demands a certificate of its clients too."""
    key, certificate, root = files.read()
    return grpc.ssl_server_credentials([(key, certificate)], root, require_client_auth=True)


def channel_options(files: TlsFiles | None) -> tuple[tuple[str, str], ...]:
    """gRPC options that a client of these files needs beside the credentials."""
    return (("grpc.ssl_target_name_override", files.name),) if files is not None and files.name else ()


def channel_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    """Credentials of a client that shows its own certificate."""
    key, certificate, root = files.read()
    return grpc.ssl_channel_credentials(root, key, certificate)
