use super::keys::Keys;
use crate::family::{Family, WindowKeys};

/// Attention that sees the last tokens only, in some of the blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlidingWindow {
    /// How many tokens a query sees, its own included.
    pub size: usize,
    /// Which blocks.
    pub blocks: Windowed,
}

/// The blocks that see a window only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Windowed {
    /// This one and all behind it.
    From(usize),
    /// All but the last of each so many.
    ButEvery(usize),
}

impl Windowed {
    /// Whether the block at `layer` is one of them.
    pub fn contains(self, layer: usize) -> bool {
        match self {
            Self::From(first) => layer >= first,
            Self::ButEvery(period) => !(layer + 1).is_multiple_of(period),
        }
    }

    /// Those that `layers` lists, in one way where there are several; `None` for another order, or
    /// where there are none.
    pub(crate) fn of(layers: &[bool]) -> Option<Self> {
        let first = layers.iter().position(|windowed| *windowed)?;
        let full = layers.iter().position(|windowed| !windowed);
        let rules = [Some(Self::From(first)), full.map(|at| Self::ButEvery(at + 1))];
        rules
            .into_iter()
            .flatten()
            .find(|rule| layers.iter().enumerate().all(|(i, w)| rule.contains(i) == *w))
    }
}

impl SlidingWindow {
    /// The window of `size` tokens in those of `layers` blocks that `contains` it; `None` where
    /// there is no such block.
    pub fn new(size: usize, blocks: Windowed, layers: usize) -> Option<Self> {
        let layers: Vec<bool> = (0..layers).map(|layer| blocks.contains(layer)).collect();
        Windowed::of(&layers).map(|blocks| Self { size, blocks })
    }
}

impl Keys {
    /// The window, and which blocks have it: as `layer_types` lists them, or by the family's rule.
    pub fn sliding_window(&mut self, family: Family, layers: usize) -> Option<SlidingWindow> {
        let by_rule = match family.traits().window {
            WindowKeys::None => None,
            WindowKeys::All => Some(Windowed::From(0)),
            WindowKeys::From if !self.flag("use_sliding_window") => return None,
            WindowKeys::From => Some(Windowed::From(self.whole_from_0("max_window_layers"))),
            WindowKeys::ButEvery(period) => {
                Some(Windowed::ButEvery(self.size_or("sliding_window_pattern", period)))
            }
        };
        let listed = self.layer_types();
        let size = if by_rule.is_some() { self.size_or_none("sliding_window") } else { None };
        let blocks = match (&listed, by_rule) {
            (Some(listed), _) if !listed.contains(&true) => return None,
            (Some(listed), Some(_)) => match Windowed::of(listed) {
                Some(blocks) if listed.len() == layers => blocks,
                Some(_) => {
                    let found = listed.len();
                    self.problem(format!("layer_types: expected {layers} of them, found {found}"));
                    return None;
                }
                None => {
                    self.problem("layer_types: blocks in this order are not supported".into());
                    return None;
                }
            },
            (Some(_), None) => {
                self.problem(
                    "layer_types: \"sliding_attention\" is not supported for this model_type".into(),
                );
                return None;
            }
            (None, Some(blocks)) => blocks,
            (None, None) => return None,
        };
        if let Some(size) = size {
            return SlidingWindow::new(size, blocks, layers.min(super::MOST_LAYERS));
        }
        if listed.is_some() || family.traits().window != WindowKeys::All {
            self.problem("sliding_window: expected a whole number from 1, found none".into());
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_is_found_again() {
        for (rule, layers) in [
            (Windowed::From(0), 5),
            (Windowed::From(3), 5),
            (Windowed::ButEvery(2), 5),
            (Windowed::ButEvery(6), 13),
            (Windowed::ButEvery(3), 3),
        ] {
            let window = SlidingWindow::new(7, rule, layers).unwrap();
            assert_eq!(window.blocks, rule);
        }
        let two_of_six = SlidingWindow::new(7, Windowed::ButEvery(6), 2).unwrap();
        assert_eq!(two_of_six.blocks, Windowed::From(0), "the same blocks, told in one way");
        assert_eq!(SlidingWindow::new(7, Windowed::From(5), 5), None);
        assert_eq!(Windowed::of(&[true, false, false, true]), None);
    }
}
