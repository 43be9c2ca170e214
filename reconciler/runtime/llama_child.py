"""
The child that runs a test job with llama.cpp, inside the sandbox: one JSON job on standard input, one JSON verdict out.

It believes nothing of the model and is believed little itself: what it says counts only with the job's nonce, and whatever it does,
its parent ends it in time. It writes its verdict to a duplicate of standard output, since llama.cpp prints to the original.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

#: Tokens of context that a test job gets: a model's own claim may be any number (one of 2^31 hung the loader).
CONTEXT = 512
_TEXT_CHARACTERS = 2000


class Bad(Exception):
    """The model is at fault."""


class Unable(Exception):
    """The node could not test it now."""


def main() -> None:
    """Run the job on standard input."""
    job = json.loads(sys.stdin.buffer.read())
    out = os.dup(1)
    os.dup2(2, 1)
    verdict: dict[str, Any] = {"nonce": job["nonce"], "verdict": "passed"}
    try:
        verdict |= _run(job)
    except Bad as error:
        verdict |= {"verdict": "bad", "reason": str(error)}
    except (Unable, MemoryError) as error:
        verdict |= {"verdict": "unable", "reason": str(error) or "not enough memory for the test job"}
    except Exception as error:  # noqa: BLE001  whatever a hostile file provokes is the file's fault
        verdict |= {"verdict": "bad", "reason": f"{type(error).__name__}: {error}"[:500]}
    os.write(out, json.dumps(verdict).encode())
    os._exit(0)  # no destructor of a half-loaded model gets a say


def _run(job: dict[str, Any]) -> dict[str, Any]:
    from reconciler import gguf

    try:
        gguf.check(Path(job["model"]))
    except gguf.Malformed as error:
        raise Bad(f"not a sound GGUF file: {error}") from None
    import llama_cpp

    began = time.perf_counter()
    model = _load(llama_cpp, job)
    loaded = time.perf_counter() - began
    smoke = job["smoke"]
    began = time.perf_counter()
    found = _embed(model, smoke) if smoke["task"] == "embedding" else _generate(llama_cpp, model, smoke)
    seconds = time.perf_counter() - began
    tokens = found.get("tokens", 0)
    found |= {
        "load_seconds": loaded,
        "run_seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
        "engine_version": llama_cpp.__version__,
        **_device(llama_cpp, job),
    }
    _judge(found, smoke)
    return found


def _load(llama_cpp: Any, job: dict[str, Any]) -> Any:
    options, smoke = job["options"], job["smoke"]
    try:
        return llama_cpp.Llama(
            model_path=job["model"],
            n_ctx=CONTEXT,
            n_batch=CONTEXT,
            n_gpu_layers=options["gpu_layers"] if llama_cpp.llama_supports_gpu_offload() else 0,
            n_threads=options["threads"] or None,
            seed=smoke["seed"],
            embedding=smoke["task"] == "embedding",
            logits_all=False,
            use_mmap=True,
            verbose=True,
        )
    except ValueError as error:
        raise Bad(f"the engine does not load it: {error}".replace(job["model"], Path(job["model"]).name)) from None


def _device(llama_cpp: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Say what really ran the job; the parent compares with what the node has."""
    offload = bool(llama_cpp.llama_supports_gpu_offload()) and job["options"]["gpu_layers"] != 0
    return {"gpu_layers": job["options"]["gpu_layers"] if offload else 0, "device": "gpu" if offload else "cpu"}


def _generate(llama_cpp: Any, model: Any, smoke: dict[str, Any]) -> dict[str, Any]:
    """Generate at temperature 0, token by token, looking at every logit: NaN weights load well and answer nothing."""
    prompt = _chat_tokens(model, smoke) if smoke["task"] == "chat" else model.tokenize(smoke["prompt"].encode(), add_bos=True)
    if len(prompt) + smoke["max_tokens"] > CONTEXT:
        prompt = prompt[: max(1, CONTEXT - smoke["max_tokens"])]
    ids: list[int] = []
    stop = model.token_eos()
    for token in model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
        _refuse_nonfinite(llama_cpp, model)
        if token == stop:
            break
        ids.append(int(token))
        if len(ids) >= smoke["max_tokens"]:
            break
    text = model.detokenize(ids).decode(errors="replace")
    return {"tokens": len(ids), "token_ids": ids, "text": text[:_TEXT_CHARACTERS]}


def _refuse_nonfinite(llama_cpp: Any, model: Any) -> None:
    import numpy as np

    logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    if not logits or not np.isfinite(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),))).all():
        raise Bad("its logits are not finite numbers")


def _chat_tokens(model: Any, smoke: dict[str, Any]) -> list[int]:
    """Render the file's own chat template, in Jinja's sandbox inside ours: it is code from a stranger."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = model.metadata.get("tokenizer.chat_template")
    if template is None:
        raise Bad("it is to chat, and its file has no chat template")
    bos, eos = (model.detokenize([token], special=True).decode(errors="replace") for token in (model.token_bos(), model.token_eos()))
    try:
        formatter = Jinja2ChatFormatter(template=template, eos_token=eos, bos_token=bos)
        prompt = formatter(messages=[{"role": "user", "content": smoke["prompt"]}]).prompt
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  a template can raise anything
        raise Bad(f"its chat template does not render: {type(error).__name__}: {error}"[:500]) from None
    tokens: list[int] = model.tokenize(prompt[: CONTEXT * 16].encode(), add_bos=True, special=True)
    return tokens


def _embed(model: Any, smoke: dict[str, Any]) -> dict[str, Any]:
    found = model.create_embedding(smoke["prompt"])["data"][0]["embedding"]
    vector = found[0] if found and isinstance(found[0], list) else found
    if not vector or not all(math.isfinite(value) for value in vector):
        raise Bad("its embedding is not made of finite numbers")
    if not any(vector):
        raise Bad("its embedding is all zeros")
    return {"dimension": len(vector), "tokens": len(model.tokenize(smoke["prompt"].encode()))}


def _judge(found: dict[str, Any], smoke: dict[str, Any]) -> None:
    """Compare with what the snapshot expects. A regular expression from the network runs here, where its time is bounded."""
    expect = smoke["expect"]
    text = found.get("text", "")
    if found.get("tokens", 0) < expect["min_tokens"]:
        raise Bad(f"it generated {found.get('tokens', 0)} tokens, expected at least {expect['min_tokens']}; it said {text[:200]!r}")
    if expect["text"] is not None and expect["text"] not in text:
        raise Bad(f"its answer does not contain {expect['text'][:100]!r}; it said {text[:200]!r}")
    if expect["regex"] is not None and not re.search(expect["regex"], text):
        raise Bad(f"its answer does not match {expect['regex'][:100]!r}; it said {text[:200]!r}")
    if expect["tokens"] is not None and found.get("token_ids") != expect["tokens"]:
        raise Bad(f"it generated the tokens {found.get('token_ids')}, expected {expect['tokens']}"[:500])
    if found["tokens_per_second"] < expect["min_rate"]:
        raise Bad(f"it generated {found['tokens_per_second']:.1f} tokens a second, expected at least {expect['min_rate']}")
    if expect["dimension"] is not None and found.get("dimension") != expect["dimension"]:
        raise Bad(f"its embedding has {found.get('dimension')} components, expected {expect['dimension']}")


if __name__ == "__main__":
    main()
