"""Commands about a trained network or a run: evaluate, export and predict, and clean the run's folder."""
