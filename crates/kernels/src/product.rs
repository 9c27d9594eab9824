//! Matrix products of one thread, on slices.

/// A matrix of numbers that lie `strides` apart, between rows and between columns.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    values: &'a [f32],
    shape: [usize; 2],
    strides: [usize; 2],
}

impl<'a> Matrix<'a> {
    /// Rows of `cols` numbers each, `stride` from one to the next.
    ///
    /// # Panics
    /// Where `values` end before the last row does.
    pub fn new(values: &'a [f32], [rows, cols]: [usize; 2], stride: usize) -> Self {
        assert!(rows == 0 || values.len() >= (rows - 1) * stride + cols, "a matrix ends too early");
        Self { values, shape: [rows, cols], strides: [stride, 1] }
    }

    /// Rows one after another.
    pub fn rows(values: &'a [f32], cols: usize) -> Self {
        Self::new(values, [values.len() / cols, cols], cols)
    }

    /// Rows and columns.
    pub fn shape(self) -> [usize; 2] {
        self.shape
    }

    /// The same numbers, rows for columns.
    #[must_use]
    pub fn transposed(self) -> Self {
        let ([rows, cols], [down, right]) = (self.shape, self.strides);
        Self { values: self.values, shape: [cols, rows], strides: [right, down] }
    }
}

/// `c = a b`, or `c += a b`; rows of `c` lie one after another.
///
/// # Panics
/// Where the shapes do not fit.
pub fn multiply(a: Matrix, b: Matrix, c: &mut [f32], add: bool) {
    let ([m, k], [n_rows, n]) = (a.shape, b.shape);
    assert!(k == n_rows && c.len() == m * n, "shapes of a product");
    let [a_row, a_col] = a.strides.map(|stride| stride as isize);
    let [b_row, b_col] = b.strides.map(|stride| stride as isize);
    let keep = if add { 1.0 } else { 0.0 };
    // SAFETY: a and b hold what their shapes and strides reach, as `Matrix::new` has checked, and c
    // its [m, n] by the assertion.
    #[allow(unsafe_code)]
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            n as isize,
            add,
            a.values.as_ptr(),
            a_col,
            a_row,
            b.values.as_ptr(),
            b_col,
            b_row,
            keep,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
