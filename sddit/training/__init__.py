"""Training and evaluation of one experiment. Imports neither ray nor mlflow."""
