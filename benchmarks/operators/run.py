"""Run the cases of the operator benchmark and yield one row a provider, layout and mode."""

import logging
import statistics
import time
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.operators import measure
from benchmarks.operators.cases import CASES, SCALES, Case, Setting, Traffic
from hkd_d2 import ops
from hkd_d2.ops import _library, reference

# eager: the reference in plain PyTorch; usual: what is usually written, where that differs (RoI
# pooling as Detectron2 composes it of torchvision's roi_align; a mask times a loss of whole maps);
# compile: torch.compile of the reference; fused: the fused operator.
PROVIDERS = ("eager", "usual", "compile", "fused")

# Relative error beyond which a provider does not compute the same thing. Sums in float32.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Far more than caches hold.
STREAM_BYTES = 1 << 28


class Differs(Exception):
    """A provider's result is not the reference's."""


def provide(provider: str, case: Case, device: torch.device):
    """The operator of a provider, or None where it has none for this case and device."""
    plain = getattr(reference, case.operator)
    if provider == "eager":
        return plain
    if provider == "usual":
        return case.usual
    if provider == "compile":
        return torch.compile(plain, dynamic=False)
    compiled = (case.operator, device.type) in _library.COMPILED
    return partial(getattr(ops, case.operator), impl="fused") if compiled else None


def _prepare_compile():
    """Forget what earlier cases compiled, and compile every shape of this one."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # graph breaks are expected


def _variants(case, scale, device, dtype, providers, say):
    """(problem, operator) by (provider, layout), checked against the reference, and their extra
    memory."""
    problems = {
        layout: case.build(Setting(SCALES[scale], layout, device, dtype)) for layout in case.layouts
    }
    plain = getattr(reference, case.operator)
    expected = measure.evaluate(next(iter(problems.values())), plain)
    variants, memory = {}, {}
    for provider in providers:
        operator = provide(provider, case, device)
        if operator is None:
            if provider == "fused":
                say(f"    fused: {case.operator} is not compiled for {device.type}")
            continue
        for layout, problem in problems.items():
            try:
                results = measure.evaluate(problem, operator)
            except ModuleNotFoundError as error:  # torchvision, for one
                say(f"    {provider}: left out ({error})")
                break
            except Exception as error:
                if provider != "compile":
                    raise
                # What torch.compile can take depends on the machine's compiler, for one.
                say(f"    compile, {layout}: left out ({str(error).strip().splitlines()[0]})")
                continue
            error = measure.difference(results, expected)
            if not error < TOLERANCE[dtype]:
                raise Differs(
                    f"{case.operator} by {provider} in {layout} differs from the reference by "
                    f"{error:.1e} (relative); its time would mean nothing."
                )
            del results
            memory[provider, layout] = measure.extra_memory(problem, operator, device)
            variants[provider, layout] = problem, operator
    return variants, memory


def run_case(name, scale, device, dtype, providers, seconds, say=print) -> Iterator[dict]:
    """Rows of one case: what differs from row to row of a run.

    Raises:
        Differs: a provider does not agree with the reference.
    """
    case = CASES[name]
    if "compile" in providers:
        _prepare_compile()
    variants, memory = _variants(case, scale, device, dtype, providers, say)
    stream_bytes = STREAM_BYTES if scale != "tiny" else STREAM_BYTES >> 8
    samples, bandwidth = measure.measure(variants, seconds, device, stream_bytes)

    seen, medians = {}, {}
    for key, pairs in samples.items():
        forward, backward = map(list, zip(*pairs, strict=True))
        full = [f + b for f, b in pairs]
        for mode, values in zip(measure.MODES, (forward, backward, full), strict=True):
            seen[*key, mode] = values
            medians[*key, mode] = statistics.median(values)

    def ratio(provider, mode, median):
        """To the faster layout of another provider."""
        others = [m for (p, _, o), m in medians.items() if (p, o) == (provider, mode)]
        return min(others) / median if others else ""

    for (provider, layout, mode), median in medians.items():
        problem = variants[provider, layout][0]
        passes = {"forward": problem.forward, "backward": problem.backward}
        traffic = passes.get(mode, problem.forward + problem.backward)
        extra = memory[provider, layout]
        values = seen[provider, layout, mode]
        yield {
            "case": name,
            "dtype": str(dtype).removeprefix("torch."),
            "layout": layout,
            "provider": provider,
            "mode": mode,
            "rounds": len(values),
            "median_ms": median * 1e3,
            "p20_ms": measure.percentile(values, 0.2) * 1e3,
            "p80_ms": measure.percentile(values, 0.8) * 1e3,
            "gb_per_s": (traffic.read + traffic.write) / median / 1e9,
            "percent_of_floor": 100 * traffic.seconds(Traffic(*bandwidth)) / median,
            "ratio_to_eager": ratio("eager", mode, median),
            "ratio_to_usual": ratio("usual", mode, median),
            "extra_mb": extra / 1e6 if mode == "full" and extra is not None else "",
            "read_gb_per_s": bandwidth[0] / 1e9,
            "write_gb_per_s": bandwidth[1] / 1e9,
        }


def run(names, scale, device, dtype, providers, seconds, say=print) -> Iterator[list[dict]]:
    """Rows of several cases, one list a case, with progress and the time that is left."""
    start = time.monotonic()
    for number, name in enumerate(names):
        left = ""
        if number:
            minutes = (time.monotonic() - start) / number * (len(names) - number) / 60
            left = f", about {minutes:.1f} min left"
        say(f"[{number + 1}/{len(names)}] {name}{left}")
        yield list(run_case(name, scale, device, dtype, providers, seconds, say))
