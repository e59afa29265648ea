"""Data: files and hubs become records, samples, rows and batches."""
