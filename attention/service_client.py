"""An ingress's end of an attention worker's stream, for asyncio."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator

import grpc
import grpc.aio

from attention.requests import GenerateRequest, Update
from attention.service import METHOD, OPTIONS, identity
from experts.tls import TlsFiles, channel_credentials, channel_options

CHANNEL_OPTIONS = (*OPTIONS, ("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))


class WorkerLost(Exception):
    """The stream to an attention worker broke; its requests can be replayed on another."""


class AttentionClient:
    """One worker. Requests share one stream; each gets its own updates, in order."""

    def __init__(self, address: str, token: str | None = None, tls: TlsFiles | None = None) -> None:
        self.address = address
        options = (*CHANNEL_OPTIONS, *channel_options(tls))
        if tls is None:
            self._channel = grpc.aio.insecure_channel(address, options=options)
        else:
            self._channel = grpc.aio.secure_channel(address, channel_credentials(tls), options=options)
        call = self._channel.stream_stream(METHOD, identity, identity)
        self._stream = call(metadata=(("shoal-token", token),) if token else ())
        self._queues: dict[str, asyncio.Queue[Update | None]] = {}
        self._lost: str | None = None
        self._write_lock = asyncio.Lock()
        self._reader = asyncio.create_task(self._read())

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
            await self._send({"submit": request.to_json_dict()})
            while not finished:
                update = await updates.get() if self._lost is None or not updates.empty() else None
                if update is None:
                    raise WorkerLost(f"attention worker {self.address}: {self._lost}")
                finished = update.finish_reason is not None
                yield update
        finally:
            del self._queues[request.id]
            if not finished and self._lost is None:
                await self._cancel(request.id)

    async def close(self) -> None:
        """Hang up; requests still running here raise WorkerLost."""
        self._lose("closed")
        self._stream.cancel()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._channel.close()

    async def _cancel(self, request_id: str) -> None:
        with contextlib.suppress(WorkerLost):  # its blocks went with it
            await self._send({"cancel": request_id})

    async def _send(self, message: object) -> None:
        if self._lost is not None:
            raise WorkerLost(f"attention worker {self.address}: {self._lost}")
        try:
            async with self._write_lock:
                await self._stream.write(json.dumps(message, separators=(",", ":")).encode())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            self._lose(str(error))
            raise WorkerLost(f"attention worker {self.address}: {self._lost}") from error

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
