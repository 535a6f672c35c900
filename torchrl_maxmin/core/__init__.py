"""The ground floor: settings, errors, progress, runs, tables and tasks."""
