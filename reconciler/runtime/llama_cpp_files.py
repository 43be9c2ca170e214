"""
What is loaded with a model in llama.cpp: LoRA adapters, projectors, draft models. Runs inside the sandbox, for ``llama_cpp_worker``.

Rules that hold here:

1. Each file is loaded against the very model that it lies beside, and used once: nothing is called tested that only opened.
2. A refusal names the file. What the engine wrote about it is on standard error.
3. A draft model's vocabulary must be the model's, by llama.cpp's own rule (``common_speculative_are_compatible``).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reconciler.core.gguf import GgufFacts
from reconciler.runtime import result
from reconciler.runtime.result import BadModel

#: Draft models that read the model's own hidden state: they run with it alone, and are only loaded here.
_DEPENDENT_DRAFTS = {"eagle3", "dflash"}
#: llama.cpp lets a draft's vocabulary be this much larger or smaller, and does not compare the first tokens.
_VOCABULARY_DIFFERENCE, _FIRST_COMPARED = 128, 5
_PICTURE_SIDE = 64
_MOST_PICTURE_TOKENS = 32_768
_SOUND_SECONDS = 1.0
_TONE_HERTZ = 440.0


@contextlib.contextmanager
def blamed(path: str, what: str) -> Iterator[None]:
    """Report that *what* at *path* is being loaded; name it in whatever is found wrong with it."""
    result.report_phase(f"loading the {what} {path!r}")
    try:
        yield
    except BadModel as error:
        raise BadModel(f"the {what} {path!r}: {error}") from None
    except (ValueError, RuntimeError) as error:
        raise BadModel(f"the {what} {path!r}: the engine does not run it: {error}"[:500]) from None


# -- adapters --------------------------------------------------------------------------------------


class Adapters:
    """The LoRA adapters of *model*, by path in *tree*; they end with the model."""

    def __init__(self, llama_cpp: Any, model: Any, tree: Path, paths: list[str]) -> None:
        self.paths = paths
        self._library = llama_cpp
        self._handles = [self._loaded(model, tree, path) for path in paths]

    def _loaded(self, model: Any, tree: Path, path: str) -> Any:
        with blamed(path, "LoRA adapter"):
            handle = self._library.llama_adapter_lora_init(native_model(model), str(tree / path).encode())
            if not handle:
                raise BadModel("the engine does not load it with this model")
            return handle

    def apply(self, context: Any) -> None:
        """
        Let *context* compute with all of them, at full scale.

        Raises:
            BadModel: the engine refuses.
        """
        if not self._handles:
            return
        count = len(self._handles)
        if hasattr(self._library, "llama_set_adapters_lora"):
            handles = (self._library.llama_adapter_lora_p_ctypes * count)(*self._handles)
            refused = self._library.llama_set_adapters_lora(context, handles, count, (ctypes.c_float * count)(*[1.0] * count))
        else:  # an older binding
            refused = sum(self._library.llama_set_adapter_lora(context, handle, 1.0) for handle in self._handles)
        if refused:
            raise BadModel(f"the engine does not apply the LoRA adapters {', '.join(map(repr, self.paths))}")


def native_model(model: Any) -> Any:
    """Return the C library's handle of a binding's *model*."""
    return model._model.model  # noqa: SLF001  the binding has no public name for it


# -- projectors ------------------------------------------------------------------------------------


class Projector:
    """A projector, loaded against *model*."""

    def __init__(self, llama_cpp: Any, model: Any, path: Path, *, gpu: bool, threads: int) -> None:
        from llama_cpp import mtmd_cpp

        self._llama_cpp, self._library, self._model = llama_cpp, mtmd_cpp, model
        chosen = mtmd_cpp.mtmd_context_params_default()
        chosen.use_gpu, chosen.print_timings, chosen.warmup = gpu, False, False
        if threads:
            chosen.n_threads = threads
        self._context = mtmd_cpp.mtmd_init_from_file(str(path).encode(), native_model(model), chosen)
        if not self._context:
            raise BadModel("the engine does not load it with this model")

    def try_all(self, adapters: Adapters, *, embedding: bool) -> bool:
        """
        Let one small picture, and a second of sound, go through it and the model, as far as it takes these; return whether it takes any.

        Raises:
            BadModel: one of them does not come through, or what comes out is not finite.
        """
        library, taken = self._library, False
        if library.mtmd_support_vision(self._context):
            self._try("a small picture", self._picture(), adapters, embedding=embedding)
            taken = True
        if library.mtmd_support_audio(self._context):
            self._try("a second of sound", self._sound(), adapters, embedding=embedding)
            taken = True
        return taken

    def _picture(self) -> Any:
        side = _PICTURE_SIDE
        pixels = bytes(value for row in range(side) for column in range(side) for value in (4 * row, 4 * column, 255 - 4 * row))
        return self._library.mtmd_bitmap_init(side, side, (ctypes.c_uint8 * len(pixels)).from_buffer_copy(pixels))

    def _sound(self) -> Any:
        ask = getattr(self._library, "mtmd_get_audio_sample_rate", None) or self._library.mtmd_get_audio_bitrate
        rate = max(8_000, int(ask(self._context)))
        samples = [0.5 * math.sin(2 * math.pi * _TONE_HERTZ * index / rate) for index in range(int(rate * _SOUND_SECONDS))]
        return self._library.mtmd_bitmap_init_from_audio(len(samples), (ctypes.c_float * len(samples))(*samples))

    def _try(self, what: str, bitmap: Any, adapters: Adapters, *, embedding: bool) -> None:
        library = self._library
        chunks = library.mtmd_input_chunks_init()
        prompt = library.mtmd_default_marker() + b"\nWhat is this?"
        text = library.mtmd_input_text()
        text.text, text.text_len, text.add_special, text.parse_special = prompt, len(prompt), True, True
        if code := library.mtmd_tokenize(self._context, chunks, ctypes.byref(text), (ctypes.c_void_p * 1)(bitmap), 1):
            raise BadModel(f"the engine does not take {what} through it (code {code})")
        if embedding:
            self._encode(what, chunks)
        else:
            self._decode(what, chunks, adapters)

    def _encode(self, what: str, chunks: Any) -> None:
        """Let the picture or sound through the projector alone: an embedding model has no logits."""
        import numpy as np

        library = self._library
        for index in range(library.mtmd_input_chunks_size(chunks)):
            chunk = library.mtmd_input_chunks_get(chunks, index)
            if library.mtmd_input_chunk_get_type(chunk) == library.MTMD_INPUT_CHUNK_TYPE_TEXT:
                continue
            if library.mtmd_encode_chunk(self._context, chunk):
                raise BadModel(f"the engine does not encode {what}")
            size = library.mtmd_input_chunk_get_n_tokens(chunk) * self._model.n_embd()
            if not np.isfinite(np.ctypeslib.as_array(library.mtmd_get_output_embd(self._context), shape=(size,))).all():
                raise BadModel(f"what it makes of {what} is not made of finite numbers")

    def _decode(self, what: str, chunks: Any, adapters: Adapters) -> None:
        """Let the picture or sound through projector and model, in a context of its own: pictures take more tokens than the test job."""
        count = self._library.mtmd_helper_get_n_tokens(chunks)
        if count > _MOST_PICTURE_TOKENS:
            raise BadModel(f"it makes {count:,} tokens of {what}")
        context = self._new_context(-(-(count + 16) // 256) * 256)
        adapters.apply(context.ctx)
        past = self._llama_cpp.llama_pos(0)
        library = self._library
        code = library.mtmd_helper_eval_chunks(self._context, context.ctx, chunks, 0, 0, context.params.n_batch, True, ctypes.byref(past))
        if code:
            raise BadModel(f"the engine does not take {what} through it and the model (code {code})")
        refuse_nonfinite(self._llama_cpp, context.ctx, self._model.n_vocab())

    def _new_context(self, size: int) -> Any:
        from llama_cpp import _internals

        chosen = self._llama_cpp.llama_context_default_params()
        own = self._model.context_params
        chosen.n_ctx = chosen.n_batch = chosen.n_ubatch = size  # one batch: pictures attend to themselves as a whole in some models
        chosen.n_threads, chosen.n_threads_batch = own.n_threads, own.n_threads_batch
        return _internals.LlamaContext(model=self._model._model, params=chosen, verbose=True)  # noqa: SLF001  as above


def refuse_nonfinite(llama_cpp: Any, context: Any, size: int, whose: str = "its logits") -> None:
    """
    Check the last logits of *context*: weights that are NaN load without an error.

    Raises:
        BadModel: there are none, or they are not finite.
    """
    import numpy as np

    logits = llama_cpp.llama_get_logits_ith(context, -1)
    if not logits or not np.isfinite(np.ctypeslib.as_array(logits, shape=(size,))).all():
        raise BadModel(f"{whose} are not finite numbers")


# -- draft models ----------------------------------------------------------------------------------


def runs_alone(facts: GgufFacts) -> bool:
    """Return whether a draft model runs without the hidden state of the model that it drafts for."""
    return facts.architecture not in _DEPENDENT_DRAFTS


def load_only(llama_cpp: Any, path: Path) -> Any:
    """
    Load the weights of the model at *path*, without a context, and return the C library's handle.

    Raises:
        BadModel: the engine refuses it.
    """
    chosen = llama_cpp.llama_model_default_params()
    handle = llama_cpp.llama_model_load_from_file(str(path).encode(), chosen)
    if not handle:
        raise BadModel("the engine does not load it")
    return handle


def _compared(llama_cpp: Any, vocabulary: Any) -> Iterator[tuple[str, Any]]:
    """Yield what must be the same in two vocabularies beside their tokens; the first and last token only where *vocabulary* adds them."""
    yield "kind", llama_cpp.llama_vocab_type
    yield "rule to add a first token", llama_cpp.llama_vocab_get_add_bos
    yield "rule to add a last token", llama_cpp.llama_vocab_get_add_eos
    if llama_cpp.llama_vocab_get_add_bos(vocabulary):
        yield "first token", llama_cpp.llama_vocab_bos
    if llama_cpp.llama_vocab_get_add_eos(vocabulary):
        yield "last token", llama_cpp.llama_vocab_eos


def compare_vocabularies(llama_cpp: Any, model: Any, draft: Any) -> None:
    """
    Compare the vocabulary of *draft* with that of *model*, both handles of the C library.

    Raises:
        BadModel: they differ; the message says where.
    """
    ours, theirs = llama_cpp.llama_model_get_vocab(model), llama_cpp.llama_model_get_vocab(draft)
    for name, ask in _compared(llama_cpp, ours):
        if ask(ours) != ask(theirs):
            raise BadModel(f"its vocabulary is not the model's: its {name} is {ask(theirs)}, and the model's is {ask(ours)}")
    sizes = [llama_cpp.llama_vocab_n_tokens(one) for one in (ours, theirs)]
    if abs(sizes[0] - sizes[1]) > _VOCABULARY_DIFFERENCE:
        raise BadModel(f"its vocabulary is not the model's: it has {sizes[1]:,} tokens, and the model has {sizes[0]:,}")
    text = llama_cpp.llama_vocab_get_text
    for token in range(_FIRST_COMPARED, min(sizes)):
        if text(ours, token) != text(theirs, token):
            shown = [repr(text(one, token).decode(errors="replace"))[:60] for one in (theirs, ours)]
            raise BadModel(f"its vocabulary is not the model's: token {token} is {shown[0]}, and the model's is {shown[1]}")
