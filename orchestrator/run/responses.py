"""The stage in which a model writes the responses that the student will learn from, and where the training rows then are."""

import logging
from dataclasses import asdict
from pathlib import Path

from actors.config.rollouts import ResponsesConfig
from actors.evaluation.answer_ends import read_answer_ends
from actors.examples import ExampleFile, write_examples
from actors.rollouts.base import SamplerFactory, SamplerSpec, Sampling
from actors.rollouts.build import build_sampler
from actors.rollouts.writing import WritingWork, Written, write_responses, written_rows
from orchestrator.config.run import RunConfig
from orchestrator.models.model_checks import window_of
from orchestrator.models.models import ROLES, Models, Role, ids_below, named_below, vocab_size_of
from orchestrator.run.run_dir import Facts, RunDir
from orchestrator.run.score_identity import pin_revision

logger = logging.getLogger("atkd")


def training_rows(config: RunConfig, folder: Path) -> Path:
    """Return the file of the rows that are scored and learned from in the run whose folder is ``folder``."""
    return folder / "data" / ("train.arrow" if config.responses is None else "written.arrow")


def respond(config: RunConfig, run_dir: RunDir, models: Models, sampler_factory: SamplerFactory = build_sampler) -> Facts:
    """Have the prompts of all training rows answered; what was written before is kept."""
    responses, engine = config.responses, config.writer_engine
    assert responses is not None and engine is not None, "the stage is left out where the data's own responses stay"
    data = run_dir.path / "data"
    prompts = ExampleFile(data / "train.arrow")
    writer = pin_revision(models.ready(responses.writer))
    vocab_size = vocab_size_of(writer)
    tokenizer = models.tokenizer()
    spec = SamplerSpec(
        engine=engine,
        model=writer,
        sampling=Sampling(responses.max_new_tokens, responses.temperature, responses.top_p, config.seed),
        ends=read_answer_ends(models.tokenizer_folder, tokenizer),
        longest_prompt=longest_prompt(prompts),
        ids_below=named_below(ids_below(models), vocab_size),
    )
    work = WritingWork(
        data / "train.arrow", data / "written", responses.samples_per_prompt, config.scores.rows_per_shard
    )
    total, shards = Written(0, 0, 0, 0, 0.0), work.shards(len(prompts))
    section = "teacher.engine" if responses.engine is None else "responses.engine"
    writing = write_responses(spec, work, run_dir.path / "logs", sampler_factory, section)
    for number, written in enumerate(writing, start=1):
        total += written
        logger.info(f"respond: shard {number}/{shards}, {total.rows} responses, {total.tokens} tokens")
    run_dir.gather()
    write_examples(training_rows(config, run_dir.path), written_rows(work))
    for line in describe(total, responses):
        logger.info(f"respond: {line}")
    return {"written": asdict(total)}


def longest_prompt(prompts: ExampleFile) -> int:
    """Return the tokens of the longest prompt that is answered."""
    return max(len(prompts[position].last_prompt) for position in range(len(prompts)))


def require_room_for_answers(config: RunConfig, models: Models, longest_prompt: int) -> None:
    """Raise if the longest prompt with the longest answer does not fit the window of a model.

    Raises:
        ValueError: naming the key that says how long an answer may be, and the value that would do.
    """
    served: dict[Role, set[str]] = {"teacher": {config.teacher.engine.kind}, "student": set()}
    answers = []
    if config.responses is not None and config.writer_engine is not None:
        served[config.responses.writer].add(config.writer_engine.kind)
        answers.append(("responses.max_new_tokens", config.responses.max_new_tokens))
    if config.rollouts is not None:
        served["student"].add(config.sampler_engine.kind)
        if config.teacher_sampler_engine is not None:
            served["teacher"].add(config.teacher_sampler_engine.kind)
        answers.append(("rollouts.max_new_tokens", config.rollouts.max_new_tokens))
    for role in ROLES:
        if models.made_for_the_rows(role):
            continue
        window = window_of(models.settings(role), served_by_vllm="vllm" in served[role])
        if window is None:
            continue
        room = window - longest_prompt - 1  # vLLM keeps one for a token that it generates when it scores
        for key, max_new_tokens in answers:
            if max_new_tokens > room:
                remedy = f"{key}={room} would do" if room > 0 else "a smaller data.max_tokens would do"
                raise ValueError(
                    f"{key} is {max_new_tokens}, the longest prompt has {longest_prompt} tokens, and the {role} knows {window} "
                    f"positions: {remedy}"
                )


def describe(written: Written, responses: ResponsesConfig) -> list[str]:
    """Return in words what the responses are like."""
    rows, cut = written.rows, written.rows - written.ended
    ended, empty, repeated = (f"{100 * share / rows:.1f} %" for share in (written.ended, written.empty, written.repeated))
    lines = [
        f"{rows} responses by the {responses.writer}, {written.tokens / rows:.1f} tokens each; {ended} ended by themselves, "
        f"{empty} are empty, {repeated} of their runs of four tokens repeat others"
    ]
    if cut > rows / 2:
        limit = f"responses.max_new_tokens {responses.max_new_tokens}"
        lines.append(f"{cut} of {rows} responses were cut at {limit}: the student learns few ends")
    return lines
