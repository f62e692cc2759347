"""What an ingress keeps of an answer, so that another worker can go on where a lost one stopped."""

from dataclasses import replace

from attention.requests import GenerateRequest, Update


class Replay:
    """One request and what its client got so far. Draws depend on seed and position alone, so the rest is the same."""

    def __init__(self, request: GenerateRequest) -> None:
        self._request = request
        self._sent = list(request.resumed_ids)
        self._scored = 0  # scores of the prompt that the client has
        self._skip = 0  # scores that this worker will send again
        self._tries = 0

    def begin(self) -> GenerateRequest:
        """What the next worker is asked for: the prompt, and after it the tokens that the client has.

        Under an id of its own: the next worker may be the last one, where the lost stream is just being cleaned up.
        """
        self._skip = self._scored
        self._tries += 1
        request_id = self._request.id if self._tries == 1 else f"{self._request.id}~{self._tries}"
        return replace(self._request, id=request_id, resumed_ids=tuple(self._sent))

    def take(self, update: Update) -> Update:
        """What of a worker's update is news to the client."""
        scores = update.prompt_logprobs
        if scores:
            known = min(self._skip, len(scores))
            self._skip -= known
            self._scored += len(scores) - known
            if known:
                update = replace(update, prompt_logprobs=scores[known:] or None)
        self._sent.extend(update.token_ids)
        return update if self._tries == 1 else replace(update, id=self._request.id)
