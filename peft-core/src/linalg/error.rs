//! What can be wrong with a matrix.

/// Why a decomposition does not exist or cannot be computed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum LinalgError {
    /// The number of values is not rows · columns.
    #[error("{found} values do not fill a {rows} × {columns} matrix")]
    Length {
        /// Values given.
        found: usize,
        /// Rows.
        rows: usize,
        /// Columns.
        columns: usize,
    },
    /// A value is NaN or infinite.
    #[error("row {row}, column {column} of a {rows} × {columns} matrix is {value}, which is not finite")]
    NonFinite {
        /// Its row.
        row: usize,
        /// Its column.
        column: usize,
        /// Rows.
        rows: usize,
        /// Columns.
        columns: usize,
        /// The value.
        value: f32,
    },
    /// More singular vectors or columns are asked for than there are.
    #[error("rank {rank} is above {max}, the largest of a {rows} × {columns} matrix")]
    Rank {
        /// The rank asked for.
        rank: usize,
        /// The largest possible one.
        max: usize,
        /// Rows.
        rows: usize,
        /// Columns.
        columns: usize,
    },
    /// A matrix that should be square, or fit another, does not.
    #[error("a {rows} × {columns} matrix where {expected} was expected")]
    Shape {
        /// Rows.
        rows: usize,
        /// Columns.
        columns: usize,
        /// What was expected.
        expected: &'static str,
    },
    /// A matrix that should be positive definite is not.
    #[error("the {size} × {size} matrix is not positive definite")]
    NotPositiveDefinite {
        /// Rows and columns.
        size: usize,
    },
    /// An iteration did not end.
    #[error("the {what} of a {rows} × {columns} matrix did not converge")]
    NoConvergence {
        /// Which decomposition.
        what: &'static str,
        /// Rows.
        rows: usize,
        /// Columns.
        columns: usize,
    },
}
