"""The command `python -m feature_alignment.cli.plan`; the plan itself is made in `benchmark/plan.py`, which may import the models."""

if __name__ == "__main__":
    from feature_alignment.cli.console import run_module

    run_module("feature_alignment.benchmark.plan")
