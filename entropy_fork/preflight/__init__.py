"""What can be said before a run: plan, memory, problems that verl would report late, doctor."""
