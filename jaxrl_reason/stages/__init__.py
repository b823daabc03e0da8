"""The stages of a run and the pipeline that chains them; `grpo.py` is the page to read first."""
