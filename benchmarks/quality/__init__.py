"""What fine-tuning learns and forgets: arms compared at their own best rates, over seeds; `run.py` is the command."""
