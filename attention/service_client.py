"""An ingress's end of an attention worker's stream, for asyncio."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable

import grpc
import grpc.aio

from attention.requests import GenerateRequest, Update
from attention.wire import METHOD, OPTIONS
from experts.tls import TlsFiles, channel_credentials, channel_options
from experts.wire import identity

CHANNEL_OPTIONS = (*OPTIONS, ("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))


class WorkerLost(Exception):
    """An attention worker is gone, or its stream broke; its requests can be replayed on another.

    `failed`: its engine failed, for which a request may be the cause.
    """

    def __init__(self, message: str, failed: bool = False) -> None:
        super().__init__(message)
        self.failed = failed


class AttentionClient:
    """One worker. Requests share one stream; each gets its own updates, in order."""

    def __init__(
        self,
        address: str,
        token: str | None = None,
        tls: TlsFiles | None = None,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        """`on_lost` is called once when the stream broke; not by `close`."""
        self.address = address
        self._on_lost = on_lost
        options = (*CHANNEL_OPTIONS, *channel_options(tls))
        if tls is None:
            self._channel = grpc.aio.insecure_channel(address, options=options)
        else:
            self._channel = grpc.aio.secure_channel(address, channel_credentials(tls), options=options)
        call = self._channel.stream_stream(METHOD, identity, identity)
        self._stream = call(metadata=(("shoal-token", token),) if token else ())
        self._queues: dict[str, asyncio.Queue[Update | None]] = {}
        self._lost: str | None = None
        # A task that is cancelled inside a write takes the whole stream with it, and every request on it: so requests
        # only put their messages here, and one task, which nobody cancels, writes them.
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue()
        self._reader = asyncio.create_task(self._read())
        self._writer = asyncio.create_task(self._write())

    @property
    def alive(self) -> bool:
        return self._lost is None

    @property
    def in_flight(self) -> int:
        return len(self._queues)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Update, None]:
        """Updates of one request until one has a finish_reason. Closing the iterator early cancels it.

        Raises WorkerLost when the worker went away before the last update.
        """
        updates: asyncio.Queue[Update | None] = asyncio.Queue()
        self._queues[request.id] = updates
        finished = False
        try:
            self._send({"submit": request.to_json_dict()})
            while not finished:
                update = await updates.get() if self._lost is None or not updates.empty() else None
                if update is None:
                    raise WorkerLost(f"attention worker {self.address}: {self._lost}")
                finished = update.finish_reason is not None
                if update.finish_reason == "lost":
                    self._lose(update.error or "it gave up")
                    raise WorkerLost(f"attention worker {self.address}: {update.error}", failed=True)
                yield update
        finally:
            del self._queues[request.id]
            if not finished:
                self._send({"cancel": request.id})

    async def close(self) -> None:
        """Hang up; requests still running here raise WorkerLost."""
        self._on_lost = None
        self._lose("closed")
        self._stream.cancel()
        self._reader.cancel()
        self._writer.cancel()
        await asyncio.gather(self._reader, self._writer, return_exceptions=True)
        await self._channel.close()

    def _send(self, message: object) -> None:
        self._outbox.put_nowait(json.dumps(message, separators=(",", ":")).encode())

    async def _write(self) -> None:
        # gRPC forgets the status of a refused stream when a write meets the refusal: the worker says first that it
        # accepts. This ends when the stream does, too.
        await self._stream.initial_metadata()
        while not self._stream.done():
            message = await self._outbox.get()
            try:
                await self._stream.write(message)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # the stream is over; who reads learns why

    async def _read(self) -> None:
        reason = "the stream ended"
        try:
            async for message in self._stream:
                for raw in json.loads(message)["updates"]:
                    update = Update.from_json_dict(raw)
                    target = self._queues.get(update.id)
                    if target is not None:
                        target.put_nowait(update)
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        finally:
            self._lose(reason)

    def _lose(self, reason: str) -> None:
        if self._lost is None:
            self._lost = reason
            for updates in self._queues.values():
                updates.put_nowait(None)
            if self._on_lost is not None:
                self._on_lost()
