"""How far training scales: measured gradients and a model of the step."""
