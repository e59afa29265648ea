"""The rows and steps of a run, shown as they are trained on."""
