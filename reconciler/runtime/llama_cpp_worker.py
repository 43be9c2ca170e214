"""
The child that runs a test job with llama.cpp, inside the sandbox: one JSON job on standard input, one JSON verdict on standard output.

It trusts nothing in the model, and its parent trusts it little: its verdict counts only with the job's nonce, and the parent ends it in
time whatever it does.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reconciler.core import fit, gguf, roles, units
from reconciler.runtime import inventory, known_answer, llama_cpp_files, result
from reconciler.runtime.inventory import ModelFile
from reconciler.runtime.llama_cpp_files import Adapters, Projector
from reconciler.runtime.result import TEXT_CHARACTERS, BadModel, CannotTest

_BATCH = 512
_PROMPT_CHARACTERS = 1 << 20
#: The day on which every test job runs, for chat templates that write the date: another day is no other question.
_DAY = datetime(2026, 1, 1, tzinfo=UTC)
_DEBUG, _CONTINUED = 1, 5  # of ggml_log_level (ggml.h)

_OFFLOADED = re.compile(r"load_tensors: offloaded (\d+)/\d+ layers to GPU")
#: A GPU's buffers are named for the device and its number; those in main memory have no number.
_BUFFER = re.compile(r"\w+:\s+([A-Za-z]+\d+)\s+(\w+) buffer size\s*=\s*([\d.]+) MiB")


class Log:
    """
    Reads llama.cpp's log messages, which alone tell on which device a model really ran.

    Messages come one by one and are matched from their beginning, so no name inside the model can imitate one.
    """

    def __init__(self) -> None:
        self.gpu_layers = 0
        self._buffers: dict[tuple[str, str], float] = {}
        self._shown = True
        self._callback: Any = None

    @property
    def gpu_bytes(self) -> int:
        """Bytes of the buffers that were made on a GPU."""
        return int(sum(self._buffers.values()) * (1 << 20))

    def attach(self, llama_cpp: Any) -> None:
        """Receive every message of llama.cpp from now on, and write all but debug messages to standard error."""
        self._callback = llama_cpp.llama_log_callback(self._receive)  # kept in an attribute: C holds no reference to it
        llama_cpp.llama_log_set(self._callback, None)
        with contextlib.suppress(ImportError, AttributeError):  # the part for projectors, which logs by itself
            from llama_cpp import mtmd_cpp

            mtmd_cpp.mtmd_log_set(self._callback, None)
            mtmd_cpp.mtmd_helper_log_set(self._callback, None)

    def _receive(self, level: int, text: bytes, _: Any) -> None:
        message = text.decode(errors="replace")
        self.note(message)
        self._shown = self._shown if level == _CONTINUED else level != _DEBUG
        if self._shown:
            sys.stderr.write(message)
            sys.stderr.flush()

    def note(self, message: str) -> None:
        """Record what one message tells about layers and buffers."""
        if offloaded := _OFFLOADED.match(message):
            self.gpu_layers = int(offloaded[1])
        elif buffer := _BUFFER.match(message):
            key, size = (buffer[1], buffer[2]), float(buffer[3])
            kept = self._buffers.get(key, 0.0)  # a compute buffer is reported again when it grows; of the other kinds there may be several
            self._buffers[key] = max(kept, size) if buffer[2] == "compute" else kept + size


def main() -> None:
    """Run the job on standard input."""
    os.environ["GGML_NO_BACKTRACE"] = "1"  # a failed assertion would start a debugger
    result.run_job(_run)


def _run(job: dict[str, Any]) -> dict[str, Any]:
    result.report_phase("reading the header")
    files = inventory.read(job)
    facts = files[job["entrypoint"]].facts
    assert facts is not None  # the engine is given a GGUF file, or the job has ended
    if facts.embedding and job["smoke"]["task"] != "embedding":
        raise BadModel(f"it is an embedding model, and is asked for {job['smoke']['task']}")
    llama_cpp, log = _engine(), Log()
    log.attach(llama_cpp)
    result.note(engine_version=llama_cpp.__version__, offload=_built_for_gpu(llama_cpp))
    try:
        return _test(llama_cpp, log, job, files, facts)
    finally:
        result.note(gpu_memory_used=log.gpu_bytes)


def _test(llama_cpp: Any, log: Log, job: dict[str, Any], files: dict[str, ModelFile], facts: gguf.GgufFacts) -> dict[str, Any]:
    """Load the model and run the job on it with its adapters, then load what else lies beside it; return what the model answered."""
    smoke, entrypoint, exercised = job["smoke"], job["entrypoint"], list[str]()
    result.note(exercised=exercised)  # what is added later counts too
    if llama_cpp.llama_supports_gpu_offload():
        _check_fit(job, facts, llama_cpp.__version__)
    result.report_phase("loading the model")
    began = time.perf_counter()
    model = _load(llama_cpp, job, entrypoint, _context(smoke, facts, record=job["record"]), embedding=smoke["task"] == "embedding")
    result.note(load_seconds=time.perf_counter() - began, gpu_layers=log.gpu_layers)
    exercised += roles.split_set(entrypoint, files)
    adapters = Adapters(llama_cpp, model, Path(job["tree"]), [path for path, file in files.items() if file.role == "lora" and file.facts])
    adapters.apply(model.ctx)
    found = _answered(llama_cpp, model, job, adapters)
    exercised += adapters.paths
    _compare_answer(llama_cpp, model, job)
    if job["record"] and smoke["task"] != "embedding":
        late = functools.partial(_refuse_late, job)
        found["answer"] = known_answer.record(llama_cpp, model, _prompt_tokens(model, smoke), late, tokens=smoke["max_tokens"]).answer
    for path in (path for path, file in files.items() if file.role == "mmproj"):
        exercised += _try_projector(llama_cpp, job, model, path, adapters)
    for file in files.values():
        if file.facts and file.path != entrypoint and file.role in {"draft", "model"}:
            exercised += _try_model(llama_cpp, job, model, file, files)
    return found


def _answered(llama_cpp: Any, model: Any, job: dict[str, Any], adapters: Adapters) -> dict[str, Any]:
    """Run the job itself. What was generated until something failed is in the verdict too."""
    smoke, said = job["smoke"], dict[str, Any]()
    result.report_phase("running the test job")
    began = time.perf_counter()
    try:
        if smoke["task"] == "embedding":
            said |= _embed(model, smoke, record=job["record"])
        else:
            _generate(llama_cpp, model, job, smoke, said, adapters.paths)
    except RuntimeError as error:
        raise BadModel(f"the engine does not run it: {error}"[:500]) from None
    finally:
        seconds = time.perf_counter() - began
        said |= {"run_seconds": seconds, "tokens_per_second": said.get("tokens", 0) / seconds if seconds > 0 else 0.0}
        result.note(**said)
    return said


def _try_projector(llama_cpp: Any, job: dict[str, Any], model: Any, path: str, adapters: Adapters) -> list[str]:
    """Let a picture through the projector *path* and the model; return *path*, or nothing where this engine cannot."""
    options = job["options"]
    gpu = options["gpu_layers"] != 0 and llama_cpp.llama_supports_gpu_offload()
    with llama_cpp_files.blamed(path, "projector"):
        try:
            projector = Projector(llama_cpp, model, Path(job["tree"], path), gpu=gpu, threads=options["threads"])
            taken = projector.try_all(adapters, embedding=job["smoke"]["task"] == "embedding")
        except (ImportError, AttributeError):  # an engine that was built without it, or an older binding
            return []
        return [path] if taken else []


def _try_model(llama_cpp: Any, job: dict[str, Any], model: Any, file: ModelFile, files: dict[str, ModelFile]) -> list[str]:
    """Load one more model that lies beside *model*, and let it begin an answer; a draft's vocabulary must be the model's."""
    smoke, facts = job["smoke"], file.facts
    assert facts is not None
    with llama_cpp_files.blamed(file.path, "draft model" if file.role == "draft" else "model"):
        if file.role == "draft":
            alone = llama_cpp_files.load_only(llama_cpp, Path(job["tree"], file.path))
            llama_cpp_files.compare_vocabularies(llama_cpp, llama_cpp_files.native_model(model), alone)
            llama_cpp.llama_model_free(alone)
        if file.role == "model" or llama_cpp_files.runs_alone(facts):
            brief = smoke | {"max_tokens": 1, "expect": {}, "task": "embedding" if facts.embedding else "completion"}
            other = _load(llama_cpp, job, file.path, _context(brief, facts), embedding=facts.embedding)
            if facts.embedding:
                _embed(other, brief)
            else:
                _generate(llama_cpp, other, job, brief, {})
    return list(roles.split_set(file.path, files))


def _engine() -> Any:
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise CannotTest(f"the engine llama-cpp does not start here: {error}"[:500]) from None
    return llama_cpp


def _built_for_gpu(llama_cpp: Any) -> bool:
    """Whether the engine has a part for GPUs, found or not: where it has one and finds none, that is another fault."""
    features = llama_cpp.llama_print_system_info().decode(errors="replace")
    return bool(llama_cpp.llama_supports_gpu_offload() or re.search(r"\b(CUDA|ROCm|HIP|Vulkan|SYCL|MUSA)\b", features))


def _context(smoke: dict[str, Any], facts: gguf.GgufFacts, *, record: bool = False) -> int:
    """Return a context size that holds the job for certain; a model's header may claim any number, and 2^31 hung the loader."""
    recorded = known_answer.MOST_TOKENS if record else len((smoke["expect"].get("answer") or {}).get("tokens", ()))
    tokens, prompt = max(smoke["max_tokens"], recorded), len(smoke["prompt"].encode())
    return fit.context_of(prompt_bytes=prompt, tokens=tokens, chat=smoke["task"] == "chat", most=facts.context_length)


def _check_fit(job: dict[str, Any], facts: gguf.GgufFacts, version: str) -> None:
    """Compare the estimate with what is free on the GPU, before anything is put there that another program may need."""
    gpu, layers = job.get("gpu") or {}, job["options"]["gpu_layers"]
    if not gpu.get("total") or layers == 0:
        return
    context = _context(job["smoke"], facts, record=job["record"])
    batch = context if facts.embedding else min(context, _BATCH)
    need = fit.estimate(facts.shape, fit.Job(context=context, batch=batch, layers=layers), version).gpu_bytes
    if need > gpu["free"]:
        free, total = units.human_size(gpu["free"]), units.human_size(gpu["total"])
        raise CannotTest(f"the GPU is busy: it needs about {units.human_size(need)} of {total}, and {free} are free")


def _load(llama_cpp: Any, job: dict[str, Any], path: str, context: int, *, embedding: bool) -> Any:
    options, whole = job["options"], str(Path(job["tree"], path))
    try:
        return llama_cpp.Llama(
            model_path=whole,
            n_ctx=context,
            n_batch=context,
            n_ubatch=context if embedding else min(context, _BATCH),  # an encoder processes a prompt in one batch
            n_gpu_layers=options["gpu_layers"] if llama_cpp.llama_supports_gpu_offload() else 0,
            n_threads=options["threads"] or None,
            n_threads_batch=options["threads"] or None,
            seed=job["smoke"]["seed"],
            embedding=embedding,
            logits_all=False,
            use_mmap=True,
            verbose=True,
        )
    except ValueError as error:
        raise BadModel(f"the engine does not load it: {error}".replace(whole, Path(path).name)) from None


def _generate(
    llama_cpp: Any, model: Any, job: dict[str, Any], smoke: dict[str, Any], said: dict[str, Any], adapters: Sequence[str] = ()
) -> None:
    """
    Generate at temperature 0, token by token; *said* is what was generated, at any time.

    Every logit is checked: weights that are NaN load without an error.
    """
    prompt = _prompt_tokens(model, smoke)
    _refuse_too_long(len(prompt), smoke["max_tokens"], model)
    vocabulary = model._model.vocab  # noqa: SLF001  the binding has no public name for it
    beside = f" with {', '.join(map(repr, adapters))}" if adapters else ""
    ids: list[int] = []
    try:
        for token in model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
            llama_cpp_files.refuse_nonfinite(llama_cpp, model.ctx, model.n_vocab(), f"its logits{beside}")
            if llama_cpp.llama_vocab_is_eog(vocabulary, token):
                break
            ids.append(int(token))
            if len(ids) >= smoke["max_tokens"]:
                break
            _refuse_late(job, len(ids))
    finally:
        text = model.detokenize(ids).decode(errors="replace")
        said |= {"tokens": len(ids), "token_ids": ids, "text": text[:TEXT_CHARACTERS]}


def _compare_answer(llama_cpp: Any, model: Any, job: dict[str, Any]) -> None:
    """Compare what the model computes with what the network signed, if it signed an answer (``known_answer``)."""
    smoke = job["smoke"]
    answer = smoke["expect"].get("answer")
    if not answer or smoke["task"] == "embedding" or job["record"]:
        return
    if not answer["tokens"]:
        raise BadModel(f"an embedding is expected of it, and it is asked for {smoke['task']}")
    result.report_phase("comparing its answer")
    prompt = _prompt_tokens(model, smoke)
    _refuse_too_long(len(prompt), len(answer["tokens"]), model)
    result.note(compared=known_answer.compare(llama_cpp, model, prompt, answer, functools.partial(_refuse_late, job)))


def _prompt_tokens(model: Any, smoke: dict[str, Any]) -> list[int]:
    if smoke["task"] == "chat":
        return _chat_tokens(model, smoke)
    found: list[int] = model.tokenize(smoke["prompt"].encode(), add_bos=True)
    return found


def _refuse_late(job: dict[str, Any], count: int) -> None:
    """End the job a moment before it is ended from outside, while what it said can still be told."""
    if time.monotonic() > job["until"]:
        raise BadModel(f"its test job did not end in time, after {units.count(count, 'token')}")


def _refuse_too_long(prompt: int, more: int, model: Any) -> None:
    if prompt + more > model.n_ctx():
        raise BadModel(f"the test job takes {prompt:,} tokens and asks for {more:,} more, and its context holds {model.n_ctx():,}")


def _chat_tokens(model: Any, smoke: dict[str, Any]) -> list[int]:
    """Render the file's own chat template, which is untrusted code, in Jinja's sandbox inside ours."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = model.metadata.get("tokenizer.chat_template")
    if template is None:
        raise BadModel("it is to chat, and its file has no chat template")
    begin, end = (_text_of(model, token) for token in (model.token_bos(), model.token_eos()))
    result.report_phase("rendering the chat template")
    try:
        with result.time_limited("its chat template"):
            formatter = Jinja2ChatFormatter(template=template, eos_token=end, bos_token=begin)
            formatter.strftime_now = _DAY.strftime
            rendered = formatter(messages=[{"role": "user", "content": smoke["prompt"]}])
    except BadModel:
        raise
    except Exception as error:  # noqa: BLE001  a template can raise anything, MemoryError too
        raise BadModel(f"its chat template does not render: {type(error).__name__}: {error}"[:500]) from None
    result.report_phase("running the test job")
    if not rendered.prompt.strip():
        raise BadModel("its chat template makes nothing of a message")
    if len(rendered.prompt) > _PROMPT_CHARACTERS:
        raise BadModel(f"its chat template makes {len(rendered.prompt):,} characters of one message")
    return _tokens(model, rendered.prompt, begins=bool(begin) and rendered.prompt.startswith(begin))


def _tokens(model: Any, prompt: str, *, begins: bool) -> list[int]:
    """Tokenize a rendered template; *begins*: it wrote the beginning-of-text token itself, so none is added."""
    found: list[int] = model.tokenize(prompt.encode(errors="replace"), add_bos=not begins, special=True)
    return found


def _text_of(model: Any, token: int) -> str:
    return str(model.detokenize([token], special=True).decode(errors="replace")) if token >= 0 else ""


def _embed(model: Any, smoke: dict[str, Any], *, record: bool = False) -> dict[str, Any]:
    prompt = model.tokenize(smoke["prompt"].encode(), add_bos=True)
    _refuse_too_long(len(prompt), 0, model)  # the engine would truncate the prompt without a message
    if not record:
        known_answer.refuse_other_prompt(prompt, smoke["expect"].get("answer") or {})
    vector = model.create_embedding(smoke["prompt"])["data"][0]["embedding"]
    if vector and isinstance(vector[0], list):
        raise BadModel("it is no embedding model: its file names no pooling, and it gives a vector for each token")
    found = {"dimension": result.check_embedding(vector), "tokens": len(prompt)}
    if record:
        return found | {"answer": known_answer.embedding(vector, prompt)}
    return found | {"compared": known_answer.compare_embedding(vector, smoke)}


if __name__ == "__main__":
    main()
