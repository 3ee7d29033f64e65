//! How large a model can be.

/// Bytes that a run needs whatever the model: the program, data, activations of a layer, logits of a chunk.
pub const FIXED: u64 = 1 << 30;

/// Bytes that a run needs beside the weights, as a share of them: the inputs of all layers, adapter, gradients, moments.
pub const SHARE: f64 = 0.25;

/// Parameters of the largest model that a LoRA can be trained on with recomputation in `bytes` of memory, with
/// `weight` bytes a parameter.
pub fn lora_parameters(bytes: u64, weight: u64) -> u64 {
    (bytes.saturating_sub(FIXED) as f64 / (weight as f64 * (1.0 + SHARE))) as u64
}

/// A number of parameters as models are called by.
pub fn parameters(n: u64) -> String {
    match n {
        1_000_000_000.. => format!("{:.1} B", n as f64 / 1e9),
        1_000_000.. => format!("{:.0} M", n as f64 / 1e6),
        _ => "less than 1 M".to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_and_what_comes_with_them() {
        // 5 bytes a parameter in 5 GiB beside the fixed one.
        assert_eq!(lora_parameters(6 << 30, 4), 1 << 30);
        assert_eq!(lora_parameters(6 << 30, 2), 2 << 30);
        assert_eq!(lora_parameters(1 << 20, 4), 0);
    }

    #[test]
    fn names_of_sizes() {
        assert_eq!(parameters(1_540_000_000), "1.5 B");
        assert_eq!(parameters(135_000_000), "135 M");
        assert_eq!(parameters(0), "less than 1 M");
    }
}
