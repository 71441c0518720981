"""What the jobs share: settings, run record, reports, the training loop; the only place that imports Ray and torch."""
