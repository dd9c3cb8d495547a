"""Adapts the host's server to strategies: a request is checked before anything is written, and errors are reported.

``transformers serve`` hands the generation config of a request to ``generate()``, so a mode arrives there by itself.
But an error of ``generate()`` comes out as a bare ``500``, or as the normal end of a stream. The methods of the host
that are replaced for that are named in ``hybrid_server`` alone.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from hf_hybrid.cli.serve import ServingError
from hf_hybrid.config import merged
from hf_hybrid.models.host import trained_positions
from hf_hybrid.models.release import release_note
from hf_hybrid.routing import host_arguments, named_strategy

USUAL_LENGTH = 1024
"""New tokens when neither the request nor the checkpoint says how many; the host's number."""
MOST_BEAMS = 16


@contextmanager
def hybrid_server(name: str, loaded: str, strategy: str | None) -> Iterator[None]:
    """Make a server of the host that is started inside understand strategies.

    Args:
        name: by which clients may call the model. loaded: how the host calls it, which they may use too.
        strategy: for requests that name none; None: what the checkpoint names.
    """
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.utils import GenerateManager

    def models(_: Any) -> Any:
        # The host lists the models in the cache of the Hub, none of which it serves beside the one that it was given.
        return staticmethod(lambda *_: [{"id": name, "object": "model", "created": 0, "owned_by": ""}])

    handlers = (ChatCompletionHandler, CompletionHandler, ResponseHandler)
    replaced: list[tuple[Any, str, Callable[[Any], Any]]] = [
        *((handler, "handle_request", partial(_handling, name, loaded)) for handler in handlers),
        (GenerateManager, "generate_streaming", partial(_streaming, strategy)),
        (GenerateManager, "generate_non_streaming", partial(_whole, strategy)),
        # Of another name before transformers 5.24.
        (ModelManager, "list_models" if hasattr(ModelManager, "list_models") else "get_gen_models", models),
    ]
    if missing := [f"{cls.__name__}.{attribute}" for cls, attribute, _ in replaced if attribute not in vars(cls)]:
        raise ServingError(f"the server of this transformers has no {', '.join(missing)}{release_note()}")
    before = [(cls, attribute, vars(cls)[attribute]) for cls, attribute, _ in replaced]
    for (cls, attribute, original), (*_, wrap) in zip(before, replaced, strict=True):
        setattr(cls, attribute, wrap(original))
    try:
        yield
    finally:
        for cls, attribute, original in before:
            setattr(cls, attribute, original)


def _handling(name: str, loaded: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``handle_request`` of a handler of the host so that it says what is wrong with a request."""
    from fastapi import HTTPException  # type: ignore[import-not-found]  # of the extra [serving]
    from fastapi.responses import JSONResponse  # type: ignore[import-not-found]

    async def handle_request(self: Any, body: dict[str, Any], request_id: str) -> Any:
        if body.get("model") == name:
            body["model"] = loaded
        # Tags that a user types are text. A request may say otherwise in chat_template_kwargs.
        self.chat_template_kwargs.setdefault("sanitize_control_tokens", True)
        try:
            check_body(body)
            return await original(self, body, request_id)
        except HTTPException as error:
            refused = error
        except Exception as error:  # the host reads fields as they come: all that fails here is the request
            refused = _refusal(error)
        kind = "invalid_request_error" if refused.status_code < 500 else "server_error"
        # In the form of OpenAI, the only one whose message its client shows.
        told = {"error": {"message": str(refused.detail), "type": kind, "param": None, "code": None}}
        return JSONResponse(told, status_code=refused.status_code)

    return handle_request


def _streaming(strategy: str | None, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``generate_streaming`` of the host so that it refuses before the stream begins."""

    def generate_streaming(
        self: Any, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        _prepared(model, processor, inputs, gen_config, strategy)
        return original(self, Streamed(model, gen_config), processor, inputs, gen_config, *args, **kwargs)

    return generate_streaming


def _whole(strategy: str | None, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``generate_non_streaming`` of the host so that it says what went wrong."""

    async def generate_non_streaming(
        self: Any, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        _prepared(model, processor, inputs, gen_config, strategy)
        try:
            return await original(self, Answering(model, gen_config), processor, inputs, gen_config, *args, **kwargs)
        except Exception as error:
            raise _refusal(error, 400 if isinstance(error, ValueError) else 500) from error

    return generate_non_streaming


def _prepared(model: Any, processor: Any, inputs: Any, config: Any, strategy: str | None) -> None:
    try:
        prepare(model, processor, inputs, config, strategy)
    except Exception as error:
        raise _refusal(error) from error


def _refusal(error: Exception, status: int = 400) -> Any:
    """``error`` as the host's kind of exception."""
    from fastapi import HTTPException  # type: ignore[import-not-found]

    known = isinstance(error, ValueError) and str(error)
    return HTTPException(status_code=status, detail=str(error) if known else f"{type(error).__name__}: {error}")


def check_body(body: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` for a field ``generation_config`` that is no JSON object in a string."""
    field = body.get("generation_config")
    if field is None:
        return
    form = 'generation_config must be a string that holds a JSON object, such as "{\\"hf_hybrid\\": {...}}"'
    if not isinstance(field, str):
        raise ValueError(f"{form}, not {type(field).__name__}: json.dumps() it")
    try:
        value = json.loads(field)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{form}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{form}, and this holds {type(value).__name__}")


def prepare(model: Any, processor: Any, inputs: Any, config: Any, strategy: str | None) -> None:
    """Complete the generation config of a request, in place, and check it.

    Args:
        model, processor, inputs: as the host gives them to ``generate()``. config: of this request alone.
        strategy: for a request that names none; None: what the checkpoint names.

    Raises:
        ValueError: what cannot be carried out; the message says what to change.
    """
    own = getattr(model.generation_config, "hf_hybrid", None)
    given = getattr(config, "hf_hybrid", None)
    stored = merged(given, own)
    # An empty dict asks for the host's decoding.
    if (
        strategy is not None
        and given != {}
        and (stored is None or (isinstance(stored, Mapping) and "strategy" not in stored))
    ):
        config.hf_hybrid = {**(given or {}), "strategy": strategy}
    stops = config.stop_strings
    if stops is not None and not all(isinstance(stop, str) for stop in ([stops] if isinstance(stops, str) else stops)):
        raise ValueError(f"stop={stops!r}: must be a string or a list of strings")
    _bound(model, int(inputs["input_ids"].shape[-1]), config)
    config.return_dict_in_generate = False  # the host indexes a tensor
    checked = copy.copy(config)
    checked.stop_strings = None  # turning them into a criterion takes a while, and this is the thread of all requests
    host_arguments(model, {**inputs, "generation_config": checked, "tokenizer": processor}, None, None)


def _bound(model: Any, prompt: int, config: Any) -> None:
    """Set ``max_new_tokens`` to a number that fits, and refuse what multiplies the work.

    The host compares the length of an answer with it to say whether the answer was cut.
    """
    longest = trained_positions(model)
    room = USUAL_LENGTH * USUAL_LENGTH if longest is None else longest - prompt
    if room < 1:
        raise ValueError(f"a prompt of {prompt} tokens fills the {longest} positions of the model; shorten it")
    asked = config.max_new_tokens
    if asked is None and config.max_length is not None:
        asked = config.max_length - prompt
    if asked is None:
        asked = model.generation_config.max_new_tokens or USUAL_LENGTH
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
        raise ValueError(f"{asked!r} new tokens: must be a whole number of at least 1 (max_tokens, max_new_tokens)")
    config.max_new_tokens, config.max_length = min(asked, room), None
    for field, most in (("num_return_sequences", 1), ("num_beams", MOST_BEAMS)):
        value = getattr(config, field, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most):
            raise ValueError(f"{field}={value!r}: this server allows 1" + (f" to {most}" if most > 1 else ""))


class Answering:
    """A model for one request, which tells the host's server how the answer ended.

    The server says ``length`` when an answer has ``config.max_new_tokens`` tokens, else ``stop``. So an answer that was
    cut elsewhere (no positions left) makes that number its own, and one that ends with its last token raises it.
    """

    def __init__(self, model: Any, config: Any):
        self._model, self._config = model, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **kwargs: Any) -> Any:
        """The sequences of the answer."""
        if named_strategy(self._model, kwargs) != "planned_diffusion":
            return self._model.generate(**kwargs)  # the host's rule holds
        config = copy.copy(self._config)
        config.return_dict_in_generate = True  # for the report; the host indexes a tensor
        output = self._model.generate(**{**kwargs, "generation_config": config})
        new, most = output.sequences.shape[-1] - kwargs["input_ids"].shape[-1], self._config.max_new_tokens
        self._config.max_new_tokens = new if output.report[0].ended == "length" else max(most, new + 1)
        return output.sequences


class Streamed(Answering):
    """The same for a streamed answer, so that a failure does not look like its end.

    The decoding loop always ends its streamer, because a thread may be reading. The host's server takes that for the
    end of the text and does not read the error behind it; and it puts the error into JSON unescaped.
    """

    def generate(self, *, streamer: Any, **kwargs: Any) -> None:
        """Write the answer into ``streamer``."""
        try:
            super().generate(streamer=_Open(streamer), **kwargs)
        except Exception as error:
            text = json.dumps(str(error))[1:-1]
            if text == str(error):  # also the host's own sign that the client has gone, which it wants back as it is
                raise
            raise RuntimeError(text) from error
        streamer.end()


class _Open:
    """A streamer that ``generate()`` cannot end."""

    def __init__(self, streamer: Any):
        self.put: Callable[[Any], None] = streamer.put

    def end(self) -> None:
        """Nothing: ``Streamed`` ends it when the answer is whole."""
