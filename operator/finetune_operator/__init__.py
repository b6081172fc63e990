"""The operator: watches FineTuneJobs, runs their trainers as Jobs, and keeps their status true."""
