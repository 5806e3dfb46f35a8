"""Operations with a torch reference each, the kernels that provide them, and the table that chooses."""
