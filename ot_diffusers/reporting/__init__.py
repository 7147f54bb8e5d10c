"""Results for readers: tables, pictures, pages, and the numbers that documents quote."""
