"""The `cowstore` command: the only place that knows click, colours, exit codes and environment variables."""
