"""Prints how the operators were built and which implementation of each runs."""

import sys

from hkd_d2.ops import build_info


def main() -> int:
    info = build_info()
    if not info["modules"]["_C"]:
        print(
            "hkd_d2._C is not built, or does not fit: every operator runs its reference. Build "
            "it with: pip install --no-build-isolation -e ."
        )
    lines = {
        "hkd_d2": info["hkd_d2"],
        "PyTorch": info["torch"],
        "modules": ", ".join(
            name + ("" if built else " (not built)") for name, built in info["modules"].items()
        ),
    }
    if info["modules"]["_native"]:
        lines |= {
            "compiler": f"{info['compiler']}, C++{info['cxx_standard']}, {info['flags']}",
            "compiled for": f"PyTorch {info['built_for_torch']}",
            "CUDA": f"{info['cuda']} for {info['cuda_architectures']}" if info["cuda"] else "none",
            "instructions": f"{info['cpu_isa']} of {', '.join(info['cpu_isas'])}",
        }
    for name, value in lines.items():
        print(f"{name:<16}{value}")
    print(f"\n{'operator':<32}{'cpu':<12}cuda")
    for operator, runs in info["operators"].items():
        print(f"{operator:<32}{runs['cpu']:<12}{runs['cuda']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
