"""Open-loop load over HTTP: requests arrive when they arrive, and every latency counts from there.

    python -m benchmarks.serving --rate 2,4 --duration 5                    # a look on a CPU, under a minute
    python -m benchmarks.serving --rate 2,4,8 --duration 60 --json serving.json --plot serving.png
    python -m benchmarks.serving --adapters 64 --zipf 1.0 --slots 8
    python -m benchmarks.serving --shape llama-3-8b --adapters 64 --rows 64 --num-gpus 1 --start-s 300
    python -m benchmarks.serving --url http://localhost:8000 --prefix tenant- --adapters 100 --rate 4

Without ``--url`` it starts the server of serve_config.yaml on a free port, in a Ray instance of its own: the demo model
and its adapters, or with ``--adapters`` that many random ones, or with ``--shape`` random weights of that shape under
a tokenizer of words. With ``--url`` the server is any that speaks OpenAI's API and reports usage in a stream; device
and versions in the result are then those of this client (``--device`` says otherwise).

Arrivals are Poisson at each rate for ``--duration`` seconds, then all answers are awaited before the next rate. A
request names the n-th adapter with a probability in proportion to 1 / n ** zipf; nothing is done before to bring
adapters to their slots. Prompt and answer lengths are lognormal, with the medians ``--prompt`` and ``--output`` tokens
and ``--sigma``, clipped to 4 up to ``--max-prompt`` and ``--max-output``; prompts are random words, their number fitted
to the server's tokenizer by two requests that are not measured. Answers are greedy and go to their full length
(``ignore_eos``). The same seed sends the same requests.

A late server delays no arrival, and a request that this client sent late (late_ms_p99) counts from when it was due.
ttft_ms: to the first token. itl_ms: between events of a stream as they came, which may carry several tokens each.
token_ms: mean time a token after the first, of one request. total_ms: to the end. attained: share of all requests,
failed ones included, with ttft_ms within ``--slo-ttft-ms`` and token_ms within ``--slo-itl-ms``; goodput_rps: such
requests a second.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import httpx
import torch

from benchmarks.common.lengths import Lengths
from benchmarks.common.open_loop import offer
from benchmarks.common.report import Report, Row, device_name
from benchmarks.common.synthetic import SHAPES
from benchmarks.common.workload import Arrival, Workload
from benchmarks.serving.answer import Answer
from benchmarks.serving.host import ServingHost
from benchmarks.serving.openai_stream import OpenAIStream
from benchmarks.serving.prompt_text import PromptText, words
from benchmarks.serving.served_models import ServedModels
from benchmarks.serving.slo import Slo

FIT_WORDS = 8, 40


async def fit_prompts(stream: OpenAIStream, model: str) -> PromptText:
    """How many tokens this server's tokenizer takes for a word. Raises RuntimeError when it does not answer."""
    points: list[tuple[int, int]] = []
    for count in FIT_WORDS:
        answer = await stream.ask(model, words(count, 0), 2, time.perf_counter())
        if answer.error is not None:
            raise RuntimeError(f"{model} did not answer: {answer.error}")
        points.append((count, answer.prompt_tokens))
    return PromptText.fitted(*points)


async def measure(arguments: argparse.Namespace, url: str) -> list[Row]:
    """One row a rate."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0)
    slo = Slo(arguments.slo_ttft_ms, arguments.slo_itl_ms)
    rows: list[Row] = []
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False) as client:
        listed = await client.get("/v1/models", timeout=30)
        models = ServedModels.from_list(listed.raise_for_status().json())
        names = models.chosen(arguments.adapters, arguments.prefix)
        workload = Workload(names, arguments.zipf, arguments.prompt, arguments.output)
        stream = OpenAIStream(client, arguments.api, arguments.timeout_s)
        text = await fit_prompts(stream, models.base)

        async def send(arrival: Arrival, due: float) -> Answer:
            prompt = text.make(arrival.prompt_tokens, arrival.seed)
            return await stream.ask(arrival.model, prompt, arrival.output_tokens, due)

        for rate in arguments.rate:
            arrivals = workload.arrivals(rate, arguments.duration, arguments.seed)
            start, answers = await offer(arrivals, send)
            adapters = 0 if names == [models.base] else len(names)
            told = {"rate": rate, "duration_s": arguments.duration, "adapters": adapters, "zipf": arguments.zipf}
            rows.append(told | slo.summarize(answers, start, arguments.duration))
            print_errors(rate, answers)
    return rows


def print_errors(rate: float, answers: Sequence[Answer]) -> None:
    """The commonest errors of one rate, with their counts."""
    errors = Counter(answer.error for answer in answers if answer.error is not None)
    for error, count in errors.most_common(5):
        print(f"rate {rate:g}: {count} x {error}", file=sys.stderr, flush=True)


def run(arguments: argparse.Namespace) -> Report:
    """Measure the server given, or one started for it."""
    name = arguments.device or device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.url is not None:
        return Report("serving", name, asyncio.run(measure(arguments, arguments.url)))
    host = ServingHost(
        arguments.shape,
        arguments.adapters,
        arguments.rank,
        arguments.slots,
        arguments.rows,
        arguments.replicas,
        arguments.num_gpus,
    )
    server = host.start(arguments.start_s)
    try:
        return Report("serving", name, asyncio.run(measure(arguments, server.url)))
    finally:
        server.stop()


def main() -> None:
    """Parse the command line, measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    load = parser.add_argument_group("load")
    load.add_argument("--rate", type=_rates, default="2,4,8", help="requests a second, comma separated")
    load.add_argument("--duration", type=float, default=10.0, help="seconds of arrivals a rate")
    load.add_argument("--adapters", type=int, help="how many take part, 0 for the base model alone (default: all)")
    load.add_argument("--prefix", help="with --url: adapters are PREFIX000 and so on, instead of those listed")
    load.add_argument("--zipf", type=float, default=1.0, help="exponent of the adapters' shares; 0: all alike")
    load.add_argument("--prompt", type=float, default=64, help="median tokens of a prompt")
    load.add_argument("--output", type=float, default=32, help="median tokens of an answer")
    load.add_argument("--sigma", type=float, default=0.6, help="of both lognormal lengths")
    load.add_argument("--max-prompt", type=int, default=256)
    load.add_argument("--max-output", type=int, default=128)
    load.add_argument("--api", choices=("completions", "chat"), default="completions")
    load.add_argument("--timeout-s", type=float, default=120, help="longest wait for a whole answer")
    load.add_argument("--seed", type=int, default=0)
    load.add_argument("--slo-ttft-ms", type=float, default=500)
    load.add_argument("--slo-itl-ms", type=float, default=50)
    host = parser.add_argument_group("server")
    host.add_argument("--url", help="a server that runs already")
    host.add_argument("--device", help="what the result names as the server's device (default: this machine's)")
    host.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape (default: the demo model)")
    host.add_argument("--rank", type=int, default=16, help="of adapters that are made")
    host.add_argument("--slots", type=int, help="adapter slots a replica, of that rank")
    host.add_argument("--rows", type=int, help="most requests in one step of a replica")
    host.add_argument("--replicas", type=int, default=1)
    host.add_argument("--num-gpus", type=float, help="GPUs a replica, fractions allowed (default: as configured)")
    host.add_argument("--start-s", type=float, default=180, help="longest wait for the first answer")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--plot", type=Path, help="also draw it here (PNG)")
    arguments = parser.parse_args()
    try:
        arguments.prompt = Lengths(arguments.prompt, arguments.sigma, 4, arguments.max_prompt)
        arguments.output = Lengths(arguments.output, arguments.sigma, 4, arguments.max_output)
    except ValueError as error:
        parser.error(f"--prompt, --output: {error}")
    report = run(arguments)
    report.write(arguments.json)
    if arguments.plot:
        from benchmarks.plot.draw import save  # noqa: PLC0415 (matplotlib is an extra)

        save(report.to_dict(), arguments.plot)


def _rates(text: str) -> list[float]:
    rates = [float(part) for part in text.split(",")]
    if not all(rate > 0 for rate in rates):
        raise argparse.ArgumentTypeError("rates must be above 0")
    return rates


if __name__ == "__main__":
    main()
