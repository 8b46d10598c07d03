"""What people read of a run: its report as JSON, the pictures, and one page with all of it. Measures nothing."""
