"""Shows what the compilers said: instruction schedules of TPU kernels side by side, registers of GPU kernels."""

import json
from collections import defaultdict


def pytest_terminal_summary(terminalreporter):
    reports = terminalreporter.stats.get("passed", [])
    facts = [json.loads(value) for report in reports for name, value in report.user_properties if name == "facts"]
    schedules, registers = defaultdict(list), defaultdict(int)
    for target, program, kernels, found in facts:
        for kernel, counts in found.items():
            schedules[target].append((program, kernel, *counts.values()))
        if kernels:
            registers[target, program] = max(kernel["registers"] for kernel in kernels.values())
    if schedules:
        terminalreporter.section(
            "TPU kernels: instruction bundles, vector spills and fills, bundles of matrix products"
        )
    for target, rows in schedules.items():
        for program, kernel, *counts in sorted(rows):
            terminalreporter.write_line(f"{target:5}{program:44}{kernel:44}" + "".join(f"{n:7}" for n in counts))
    if registers:
        terminalreporter.section("GPU programs: most registers of a kernel")
    for (target, program), most in sorted(registers.items()):
        terminalreporter.write_line(f"{target:5}{program:44}{most:7}")
