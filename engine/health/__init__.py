"""What is looked at while a run is in progress: silent corruption, figures of every slice."""
