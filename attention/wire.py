"""What both ends of an attention worker's stream must agree on.

Messages are UTF-8 JSON. To the worker: {"submit": request} or {"cancel": id}. From it: {"updates": [...]}, all
updates of one step together, so that the cost of a message is paid once a step and not once a token.
"""

from experts.wire import channel_options

METHOD = "/shoal.Attention/Generate"
OPTIONS = channel_options(64 * 1024 * 1024)
