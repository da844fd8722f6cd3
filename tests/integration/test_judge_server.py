"""The judge over the wire of a real vLLM server, of a model with random weights: it answers, and what it says is nonsense."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM

from actors.config.judge import JudgeConfig
from actors.evaluation.answers import GeneratedAnswer
from orchestrator.judging.asking import ask_missing
from orchestrator.judging.client import JudgeClient
from orchestrator.judging.prompts import load_template
from orchestrator.judging.questions import QuestionMaker
from orchestrator.judging.server import address_of
from orchestrator.judging.verdicts import VerdictBook
from tests.worlds import VOCAB, word_tokenizer

START_SECONDS = 400


def random_chat_model(folder: Path) -> Path:
    """A Llama that knows made-up words only and can be asked as a chat."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def served(model: Path, log: Path) -> Iterator[str]:
    """Serve a model on the loopback while the body runs; yield the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "random",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager",
        "--kv-cache-memory-bytes", str(64 << 20), "--api-key", "key-of-the-server",
    ]  # fmt: skip
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with open(log, "w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no server after {START_SECONDS} s: {log.read_text()[-4000:]}")


@pytest.mark.slow
def test_a_real_server_is_spoken_to_and_its_nonsense_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "key-of-the-server")
    answers = [GeneratedAnswer(row, None, f"w{row}", f"w{row + 1}", f"w{row + 2}", False, None) for row in range(6)]
    with served(random_chat_model(tmp_path / "model"), tmp_path / "server.log") as address:
        settings = JudgeConfig(
            model="random", base_url=address, api_key_variable="JUDGE_KEY", max_tokens=12, most_failures=1.0, timeout_seconds=120,
            retries=0,
        )  # fmt: skip
        questions = QuestionMaker(settings, address_of(settings), load_template(settings)).ratings({"student_after": answers})
        with closing(JudgeClient(settings)) as client:
            client.require_answers()
            asked = ask_missing(questions, VerdictBook(tmp_path / "book.jsonl"), client, settings)
        assert asked.asked == asked.failures.total == 6
        assert set(asked.failures.counts) <= {"no verdict", "cut at max_tokens", "empty reply"}
        assert asked.failures.tokens_in > 6 * 50 and 0 < asked.failures.tokens_out <= 6 * 12

        other = settings.model_copy(update={"model": "other"})
        with closing(JudgeClient(other)) as client, pytest.raises(ValueError, match="'other' is not served at .* lists"):
            client.require_answers()
        monkeypatch.setenv("JUDGE_KEY", "another-key")
        with closing(JudgeClient(settings)) as client, pytest.raises(ValueError, match="refuses the key .* JUDGE_KEY, or"):
            client.require_answers()
