"""The sections of `eval/bench_speed.py`: a training step, inference, files, growth."""
