/// Which way a linear operation runs: its gradient is the same operation, run the other way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From inputs to outputs: `x W^T`, or a turn by the angles of the tables.
    Forward,
    /// From the gradient at the outputs to that at the inputs: `dy W`, or a turn back.
    Backward,
}

impl Direction {
    /// Where the gradient goes.
    pub fn reversed(self) -> Self {
        match self {
            Self::Forward => Self::Backward,
            Self::Backward => Self::Forward,
        }
    }
}
