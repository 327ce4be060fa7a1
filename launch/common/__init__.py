"""What several commands share: options, help pages, errors of the hub, figures of a run."""
