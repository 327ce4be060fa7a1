"""The page that shows a run: loss, norms per slice, spectra of ΔW."""
