//! Graphics cards by name, and what their maker publishes about them.

use miette::{Result, miette};

/// Of the operations that a card's data sheet promises, the share that a training step is assumed to reach:
/// about what large dense models reach elsewhere. `pronk bench` tells what it is where the card is at hand.
pub const UTILIZATION: f64 = 0.4;

/// A card, as its data sheet has it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Card {
    pub name: &'static str,
    /// Memory, in bytes.
    pub memory: u64,
    /// Dense bf16 operations a second of its matrix units, with float32 sums.
    pub operations_per_s: f64,
    /// Bytes that its memory gives a second.
    pub bytes_per_s: f64,
}

const fn card(name: &'static str, gigabytes: u64, teraflops: f64, gigabytes_per_s: f64) -> Card {
    let (operations_per_s, bytes_per_s) = (teraflops * 1e12, gigabytes_per_s * 1e9);
    Card { name, memory: gigabytes * 1_000_000_000, operations_per_s, bytes_per_s }
}

/// Figures without sparsity. RTX 30: NVIDIA's GA102 white paper (the 3060's, which it leaves out, as twice its float32
/// rate, as the paper's other cards have it); RTX 40: the Ada white paper (4060 and 4070 likewise); RTX 50: the
/// Blackwell RTX white paper; L4, A100 80GB SXM, H100 SXM, H200 SXM: their data sheets, half of what those give with
/// sparsity where they give only that.
const CARDS: [Card; 12] = [
    card("rtx3060", 12, 25.5, 360.0),
    card("rtx3090", 24, 71.0, 936.0),
    card("rtx4060", 8, 30.2, 272.0),
    card("rtx4070", 12, 58.3, 504.0),
    card("rtx4080", 16, 97.5, 717.0),
    card("rtx4090", 24, 165.2, 1008.0),
    card("rtx5080", 16, 112.6, 960.0),
    card("rtx5090", 32, 209.5, 1792.0),
    card("l4", 24, 121.0, 300.0),
    card("a100", 80, 312.0, 2039.0),
    card("h100", 80, 989.0, 3350.0),
    card("h200", 141, 989.0, 4800.0),
];

impl Card {
    /// The card called `name`, in capitals or not.
    pub fn named(name: &str) -> Result<Self> {
        let found = CARDS.into_iter().find(|card| card.name.eq_ignore_ascii_case(name));
        let names = || CARDS.map(|card| card.name).join(", ");
        found.ok_or_else(|| miette!("--gpu {name}: unknown; there are: {}", names()))
    }

    /// Seconds for so many operations, during which so many bytes of weights are read: whichever takes
    /// longer, at the utilization that is assumed.
    pub fn seconds(&self, operations: f64, bytes: f64) -> f64 {
        (operations / (self.operations_per_s * UTILIZATION)).max(bytes / self.bytes_per_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_bound_by_operations_or_by_memory() {
        let card = Card::named("H100").unwrap();
        assert!((card.seconds(989e12 * UTILIZATION, 1.0) - 1.0).abs() < 1e-12);
        assert!((card.seconds(1.0, 3350e9) - 1.0).abs() < 1e-12);
        assert!(Card::named("h1000").unwrap_err().to_string().contains("rtx4090"));
    }
}
