//! The Mersenne Twister MT19937 (Matsumoto & Nishimura 1998), counting its draws.
//!
//! Python twin: `at::mt19937` behind torch's CPU generator.

/// Words of state.
const N: usize = 624;
/// Distance of the words that are combined.
const M: usize = 397;

/// The generator. Skipping is the same as drawing, so a position is a number of draws.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct MersenneTwister {
    state: [u32; N],
    /// Next word of the current state.
    index: usize,
    /// Completed states.
    twists: u64,
}

impl MersenneTwister {
    pub(super) fn new(seed: u32) -> Self {
        let mut state = [seed; N];
        for i in 1..N {
            let previous = state[i - 1];
            state[i] = (previous ^ (previous >> 30))
                .wrapping_mul(1_812_433_253)
                .wrapping_add(i as u32);
        }
        Self {
            state,
            index: N,
            twists: 0,
        }
    }

    /// Number of words drawn.
    pub(super) fn draws(&self) -> u64 {
        // Before the first twist the seeded state counts as used up.
        (self.twists * N as u64 + self.index as u64) - N as u64
    }

    /// Draws 32 bits.
    pub(super) fn next(&mut self) -> u32 {
        if self.index == N {
            self.twist();
        }
        let word = self.state[self.index];
        self.index += 1;
        temper(word)
    }

    /// Draws one word for every value, many at once.
    pub(super) fn fill<T>(&mut self, values: &mut [T], make: impl Fn(u32) -> T) {
        let mut rest = values;
        while !rest.is_empty() {
            if self.index == N {
                self.twist();
            }
            let words = &self.state[self.index..];
            let count = words.len().min(rest.len());
            let (now, later) = rest.split_at_mut(count);
            for (value, word) in now.iter_mut().zip(words) {
                *value = make(temper(*word));
            }
            self.index += count;
            rest = later;
        }
    }

    /// Draws `count` times and forgets the results.
    pub(super) fn skip(&mut self, count: u64) {
        let mut left = count;
        while left > 0 {
            if self.index == N {
                self.twist();
            }
            let taken = left.min((N - self.index) as u64);
            self.index += taken as usize;
            left -= taken;
        }
    }

    fn twist(&mut self) {
        let mix = |high: u32, low: u32| {
            let word = (high & 0x8000_0000) | (low & 0x7fff_ffff);
            (word >> 1) ^ if low & 1 == 1 { 0x9908_b0df } else { 0 }
        };
        for i in 0..N - M {
            self.state[i] = self.state[i + M] ^ mix(self.state[i], self.state[i + 1]);
        }
        for i in N - M..N - 1 {
            self.state[i] = self.state[i + M - N] ^ mix(self.state[i], self.state[i + 1]);
        }
        self.state[N - 1] = self.state[M - 1] ^ mix(self.state[N - 1], self.state[0]);
        self.index = 0;
        self.twists += 1;
    }
}

fn temper(mut word: u32) -> u32 {
    word ^= word >> 11;
    word ^= (word << 7) & 0x9d2c_5680;
    word ^= (word << 15) & 0xefc6_0000;
    word ^ (word >> 18)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_sequence_comes_out() {
        let mut engine = MersenneTwister::new(42);
        let first: Vec<u32> = (0..4).map(|_| engine.next()).collect();
        assert_eq!(
            first,
            [1_608_637_542, 3_421_126_067, 4_083_286_876, 787_846_414]
        );
    }

    #[test]
    fn filling_equals_drawing() {
        let (mut drawn, mut filled) = (MersenneTwister::new(7), MersenneTwister::new(7));
        for count in [0, 1, 623, 624, 625, 5_000] {
            let mut words = vec![0; count];
            filled.fill(&mut words, |word| word);
            assert!(words.iter().all(|word| *word == drawn.next()));
            assert_eq!(filled, drawn);
        }
    }

    #[test]
    fn skipping_equals_drawing() {
        for count in [0, 1, 623, 624, 625, 5_000] {
            let (mut drawn, mut skipped) = (MersenneTwister::new(7), MersenneTwister::new(7));
            (0..count).for_each(|_| {
                drawn.next();
            });
            skipped.skip(count);
            assert_eq!((drawn.draws(), skipped.draws()), (count, count));
            assert_eq!(drawn.next(), skipped.next());
        }
    }
}
