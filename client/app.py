"""The ClientApp: answers a message itself, or hands it over to the site's worker.

Flower starts a process for every message. So nothing heavy is imported here: with a worker, this process needs no
PyTorch, and no access to images.
"""

import sys
from secrets import token_hex

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from common.contract import Kind
from common.errors import WardroundError

__all__ = ["app"]

app = ClientApp()


@app.query("join")
def join(message: Message, context: Context) -> Message:
    """Say that this site takes part, and which site it is."""
    return _reply("join", message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Return one meta-gradient over freshly drawn episodes."""
    return _reply("train", message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Return what adapting theta gives on patients that never train."""
    return _reply("evaluate", message, context)


def _reply(kind: Kind, message: Message, context: Context) -> Message:
    try:
        found = _answer(kind, message, context)
    except Exception as error:  # Flower would send its text
        incident = token_hex(4)
        said = error if isinstance(error, WardroundError) else type(error).__name__
        print(f"incident {incident}: {said}", file=sys.stderr, flush=True)
        found = Error(WardroundError.code, f"incident {incident}")
    return Message(found, reply_to=message)


def _answer(kind: Kind, message: Message, context: Context) -> RecordDict | Error:
    if "worker" in context.node_config:
        from client.worker.call import hand_over

        seconds = message.metadata.ttl
        return hand_over(str(context.node_config["worker"]), kind, message.content, context.run_config, seconds)
    from client.answers import answer  # with PyTorch

    return answer(kind, message.content, context.run_config, context.node_config)
