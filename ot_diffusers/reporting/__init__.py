"""Results as people read them: tables, pictures, pages, and the numbers that documents quote."""
