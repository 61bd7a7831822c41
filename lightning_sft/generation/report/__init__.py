"""Generation records as people see them: pages, tables, loggers."""
