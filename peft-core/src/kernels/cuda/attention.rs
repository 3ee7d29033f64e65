//! Launches of the attention kernels; `attention.cu` says what each does.

use super::backend::empty;
use super::commands::{Arguments, Launch, Source};
use super::engine::{Buffers, submit};
use super::error::Fault;
use super::queue::{COUNTERS, Queue};
use crate::kernels::attention::{AttentionInputs, AttentionShape, CachedInputs};
use burn::backend::Cube;
use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;

/// The kernels for heads of `head_dim` features.
fn source(head_dim: usize) -> Source {
    Source { name: "attention", code: include_str!("attention.cu"), constant: Some(("HEAD_DIM", head_dim)) }
}

/// Whether the kernels take these heads.
pub fn attends(shape: &AttentionShape, dtype: DType) -> bool {
    dtype == DType::BF16 && shape.head_dim.is_multiple_of(16) && (16..=256).contains(&shape.head_dim)
}

/// Tile of a kernel: rows of its blocks, threads, dynamic shared memory.
#[derive(Clone, Copy)]
struct Tile {
    rows: usize,
    threads: usize,
    shared: usize,
}

/// What all launches of a layer share.
#[derive(Clone, Copy)]
struct Geometry {
    source: Source,
    tokens: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: usize,
    scale: f32,
    epsilon: f32,
}

impl Geometry {
    fn new(shape: &AttentionShape, tokens: usize) -> Self {
        Self {
            source: source(shape.head_dim),
            tokens,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            window: shape.window.unwrap_or(0),
            scale: (shape.head_dim as f32).powf(-0.5),
            epsilon: shape.epsilon as f32,
        }
    }

    /// The tiles of forward, of the queries' gradient and of the keys' and values', and into how many slices the last
    /// is cut.
    fn tiles(&self, queue: &mut Queue) -> Result<([Tile; 3], usize), Fault> {
        let numbers = self.constants(queue)?;
        let number = |at: usize| numbers[at] as usize;
        let tile = |at: usize| Tile { rows: number(at), threads: number(at + 1), shared: number(at + 2) };
        Ok(([tile(0), tile(3), tile(6)], number(10)))
    }

    /// Threads and dynamic shared memory of a block that attends to a cache.
    fn decode(&self, queue: &mut Queue) -> Result<(usize, usize), Fault> {
        let numbers = self.constants(queue)?;
        Ok((numbers[11] as usize, numbers[12] as usize))
    }

    fn constants(&self, queue: &mut Queue) -> Result<[i32; 13], Fault> {
        queue.numbers(self.source, "attention_geometry")
    }

    /// Blocks of 256 threads for `items` heads of tokens, a few lanes each.
    fn head_blocks(&self, items: usize) -> usize {
        let lanes = match self.head_dim {
            ..=16 => 1,
            ..=32 => 2,
            ..=64 => 4,
            ..=128 => 8,
            _ => 16,
        };
        (items * lanes).div_ceil(256)
    }

    fn tiled(&self, tile: Tile, heads: usize, depth: usize) -> Launch {
        let grid = (heads, self.tokens.div_ceil(tile.rows), depth);
        Launch { grid, block: (tile.threads, 1), shared: tile.shared }
    }

    /// `N, H, KV` and what follows for the tiled kernels.
    fn numbers(&self, arguments: Arguments) -> Arguments {
        let arguments = arguments.int(self.tokens).int(self.heads).int(self.kv_heads);
        arguments.int(self.window).float(self.scale)
    }

    /// Heads that are normed and rotated, of all tokens.
    fn turned(&self) -> usize {
        self.tokens * (self.heads + self.kv_heads)
    }

    /// The arguments of norm and rotation of queries and keys, or of their backward on the gradient.
    fn turn(&self, to: u64, inputs: &Inputs) -> Arguments {
        let arguments = Arguments::default().address(to).address(inputs.qkv);
        let arguments = arguments.address(inputs.cos).address(inputs.sin);
        let arguments = arguments.address(inputs.q_norm).address(inputs.k_norm);
        arguments.int(self.tokens).int(self.heads).int(self.kv_heads).float(self.epsilon)
    }

    /// What the tiled kernels read besides their inputs: queries and keys after norm and rotation, to `qk`; which tile
    /// each block of queries, of keys takes; and what the backward starts from.
    fn prepare(
        &self,
        queue: &mut Queue,
        qk: u64,
        inputs: &Inputs,
        delta: Option<Delta>,
        of_queries: (u64, Tile),
        of_keys: Option<(u64, Tile)>,
    ) -> Result<(), Fault> {
        let blocks_of_order = |tile: Tile| self.tokens.div_ceil(tile.rows).div_ceil(256);
        let mut blocks = self.head_blocks(self.turned()) + blocks_of_order(of_queries.1);
        blocks += delta.as_ref().map_or(0, |_| self.head_blocks(self.tokens * self.heads));
        blocks += of_keys.map_or(0, |(_, tile)| blocks_of_order(tile));
        let Delta { to, dy, output } = delta.unwrap_or_default();
        let arguments = self.turn(qk, inputs).address(to).address(dy).address(output).int(self.window);
        let arguments = arguments.address(of_queries.0).address(inputs.first).int(of_queries.1.rows);
        let (order, rows) = of_keys.map_or((0, 1), |(order, tile)| (order, tile.rows));
        let arguments = arguments.address(order).address(inputs.last).int(rows);
        queue.launch(self.source, "attention_prepare", Launch::new(blocks, 256), arguments)
    }
}

/// The products of gradients and outputs, by addresses.
#[derive(Default)]
struct Delta {
    to: u64,
    dy: u64,
    output: u64,
}

/// New tokens of rows and the cache that takes their keys and values.
#[derive(Clone, Copy)]
struct Extension {
    geometry: Geometry,
    rows: usize,
    /// New tokens of each row.
    time: usize,
    /// Slots of the cache.
    slots: usize,
    /// Those filled before.
    length: usize,
}

impl Extension {
    fn new(shape: &AttentionShape, inputs: &CachedInputs<Cube>, cache: &[CubeTensor; 2]) -> Self {
        let (tokens, rows) = (inputs.qkv.meta.shape()[0], cache[0].meta.shape()[0]);
        let slots = cache[0].meta.shape()[2];
        let geometry = Geometry::new(shape, tokens);
        Self { geometry, rows, time: tokens / rows, slots, length: inputs.length }
    }

    /// Blocks of a split: 16 queries that share a key head each.
    fn units(&self) -> (usize, usize) {
        let Geometry { heads, kv_heads, .. } = self.geometry;
        (kv_heads * (self.time * heads / kv_heads).div_ceil(16), self.rows)
    }

    /// Into how many parts the keys are cut, so that few blocks are not slow blocks.
    fn splits(&self) -> usize {
        let (units, rows) = self.units();
        let keys = self.length + self.time;
        let keys = if self.geometry.window == 0 { keys } else { keys.min(self.geometry.window + self.time) };
        if units * rows > COUNTERS { 1 } else { keys.div_ceil(256).min(BLOCKS / (units * rows)).clamp(1, 16) }
    }

    /// Norm and rotation of queries, to `q` if there is one, and of keys, which go to the cache with the values.
    fn keep(&self, queue: &mut Queue, q: u64, [k, v]: [u64; 2], inputs: &Inputs) -> Result<(), Fault> {
        let Geometry { source, tokens, heads, kv_heads, epsilon, .. } = self.geometry;
        let arguments = Arguments::default().address(q).address(k).address(v).address(inputs.qkv);
        let arguments = arguments.address(inputs.cos).address(inputs.sin);
        let arguments = arguments.address(inputs.q_norm).address(inputs.k_norm);
        let arguments = arguments.int(tokens).int(self.time).int(heads).int(kv_heads);
        let arguments = arguments.int(self.slots).int(self.length).float(epsilon);
        let blocks = self.geometry.head_blocks(tokens * (heads + 2 * kv_heads));
        queue.launch(source, "attention_keep", Launch::new(blocks, 256), arguments)
    }
}

/// Blocks that keep the whole device at work.
const BLOCKS: usize = 264;

/// Addresses of the inputs; 0 for what is absent.
struct Inputs {
    qkv: u64,
    cos: u64,
    sin: u64,
    q_norm: u64,
    k_norm: u64,
    first: u64,
    last: u64,
}

/// Where the inputs stand among the buffers.
#[derive(Clone, Copy)]
struct Places {
    qkv: usize,
    rotation: Option<(usize, usize)>,
    norms: Option<(usize, usize)>,
    first: usize,
    last: Option<usize>,
}

impl Places {
    fn add(
        buffers: &mut Buffers,
        qkv: &CubeTensor,
        rotation: &Option<(CubeTensor, CubeTensor)>,
        norms: &Option<(CubeTensor, CubeTensor)>,
        first: &CubeTensor,
        last: Option<&CubeTensor>,
    ) -> Self {
        let mut pair = |pair: &Option<(CubeTensor, CubeTensor)>| {
            let add = |(a, b): &(CubeTensor, CubeTensor)| (buffers.add_rows(a), buffers.add_rows(b));
            pair.as_ref().map(add)
        };
        let (rotation, norms) = (pair(rotation), pair(norms));
        let mut add = |tensor: &CubeTensor| buffers.add_rows(tensor);
        Self { qkv: add(qkv), rotation, norms, first: add(first), last: last.map(add) }
    }

    /// Of tokens that attend to one another.
    fn joint(buffers: &mut Buffers, inputs: &AttentionInputs<Cube>) -> Self {
        let AttentionInputs { qkv, rotation, norms, first, last } = inputs;
        Self::add(buffers, qkv, rotation, norms, first, Some(last))
    }

    /// Of tokens that attend to a cache.
    fn cached(buffers: &mut Buffers, inputs: &CachedInputs<Cube>) -> Self {
        let CachedInputs { qkv, rotation, norms, first, .. } = inputs;
        Self::add(buffers, qkv, rotation, norms, first, None)
    }

    fn of(&self, buffers: &[u64]) -> Inputs {
        let pair = |pair: Option<(usize, usize)>| pair.map_or((0, 0), |(a, b)| (buffers[a], buffers[b]));
        let ((cos, sin), (q_norm, k_norm)) = (pair(self.rotation), pair(self.norms));
        let (qkv, first) = (buffers[self.qkv], buffers[self.first]);
        let last = self.last.map_or(0, |last| buffers[last]);
        Inputs { qkv, cos, sin, q_norm, k_norm, first, last }
    }
}

/// Elements for the orders of tiles: no tile has fewer rows.
fn most_tiles(tokens: usize) -> usize {
    tokens.div_ceil(16)
}

/// Bytes of the turned queries and keys.
fn rotated_bytes(shape: &AttentionShape, tokens: usize) -> usize {
    2 * tokens * (shape.heads + shape.kv_heads) * shape.head_dim
}

/// Attention, and the logarithms of its denominators `[heads, tokens]`.
pub fn forward(shape: &AttentionShape, inputs: &AttentionInputs<Cube>) -> (CubeTensor, CubeTensor) {
    let qkv = &inputs.qkv;
    let tokens = qkv.meta.shape()[0];
    let geometry = Geometry::new(shape, tokens);
    let output = empty(qkv, &[tokens, shape.heads * shape.head_dim], DType::BF16);
    let log_denominators = empty(qkv, &[shape.heads, tokens], DType::F32);
    let mut buffers = Buffers::default();
    let [o, lse] = [&output, &log_denominators].map(|tensor| buffers.add(tensor));
    let qk = buffers.add_scratch(&qkv.client, rotated_bytes(shape, tokens));
    let order = buffers.add_scratch(&qkv.client, 4 * most_tiles(tokens));
    let places = Places::joint(&mut buffers, inputs);
    submit("attention", &qkv.client, buffers, move |queue, buffers| {
        let inputs = places.of(buffers);
        let ([tile, ..], _) = geometry.tiles(queue)?;
        let (qk, order) = (buffers[qk], buffers[order]);
        geometry.prepare(queue, qk, &inputs, None, (order, tile), None)?;
        let arguments = Arguments::default().address(buffers[o]).address(buffers[lse]).address(qk);
        let arguments = arguments.address(inputs.qkv).address(inputs.first).address(order);
        let launch = geometry.tiled(tile, geometry.heads, 1);
        queue.launch(geometry.source, "attention_forward", launch, geometry.numbers(arguments))
    });
    (output, log_denominators)
}

/// The gradient of the joint queries, keys and values.
pub fn backward(
    shape: &AttentionShape,
    inputs: &AttentionInputs<Cube>,
    output: &CubeTensor,
    log_denominators: &CubeTensor,
    dy: &CubeTensor,
) -> CubeTensor {
    let qkv = &inputs.qkv;
    let tokens = qkv.meta.shape()[0];
    let geometry = Geometry::new(shape, tokens);
    let gradient = empty(qkv, &[tokens, shape.columns()], DType::BF16);
    let mut buffers = Buffers::default();
    let at = [&gradient, output, log_denominators, dy].map(|tensor| buffers.add_rows(tensor));
    let order = 4 * most_tiles(tokens);
    let scratch = [rotated_bytes(shape, tokens), 4 * shape.heads * tokens, order, order];
    let scratch = scratch.map(|bytes| buffers.add_scratch(&qkv.client, bytes));
    let places = Places::joint(&mut buffers, inputs);
    submit("attention_backward", &qkv.client, buffers, move |queue, buffers| {
        let inputs = places.of(buffers);
        let [gradient, output, lse, dy] = at.map(|at| buffers[at]);
        let [qk, delta, q_order, kv_order] = scratch.map(|at| buffers[at]);
        let ([_, q_tile, kv_tile], slices) = geometry.tiles(queue)?;
        // The kernels turn their results back themselves where nothing else stands between.
        let turns = inputs.q_norm == 0 && slices == 1;
        let (cos, sin) = if turns { (inputs.cos, inputs.sin) } else { (0, 0) };
        let products = Some(Delta { to: delta, dy, output });
        geometry.prepare(queue, qk, &inputs, products, (q_order, q_tile), Some((kv_order, kv_tile)))?;
        let arguments = |limits: u64, order: u64| {
            let arguments = Arguments::default().address(gradient).address(dy).address(qk);
            let arguments = arguments.address(inputs.qkv).address(lse).address(delta);
            geometry.numbers(arguments.address(limits).address(order).address(cos).address(sin))
        };
        let launch = geometry.tiled(kv_tile, geometry.kv_heads, slices);
        let of_keys = arguments(inputs.last, kv_order);
        queue.launch(geometry.source, "attention_backward_kv", launch, of_keys)?;
        let launch = geometry.tiled(q_tile, geometry.heads, 1);
        let of_queries = arguments(inputs.first, q_order);
        queue.launch(geometry.source, "attention_backward_q", launch, of_queries)?;
        if turns {
            return Ok(());
        }
        let launch = Launch::new(geometry.head_blocks(geometry.turned()), 256);
        queue.launch(geometry.source, "attention_rotate_backward", launch, geometry.turn(gradient, &inputs))
    });
    gradient
}

/// Keys and values of new tokens, written into the cache.
pub fn keep_keys(
    shape: &AttentionShape,
    inputs: &CachedInputs<Cube>,
    cache: [CubeTensor; 2],
) -> [CubeTensor; 2] {
    let extension = Extension::new(shape, inputs, &cache);
    let mut buffers = Buffers::default();
    let cache_at = cache.each_ref().map(|tensor| buffers.add(tensor));
    let places = Places::cached(&mut buffers, inputs);
    submit("attention_keep", &inputs.qkv.client, buffers, move |queue, buffers| {
        extension.keep(queue, 0, cache_at.map(|at| buffers[at]), &places.of(buffers))
    });
    cache
}

/// The same, and attention from the new tokens.
pub fn attend_cached(
    shape: &AttentionShape,
    inputs: &CachedInputs<Cube>,
    cache: [CubeTensor; 2],
) -> (CubeTensor, [CubeTensor; 2]) {
    let extension = Extension::new(shape, inputs, &cache);
    let Extension { geometry, time, slots, length, .. } = extension;
    let Geometry { source, tokens, heads, kv_heads, head_dim, window, scale, .. } = geometry;
    let ((units, rows), splits) = (extension.units(), extension.splits());
    let output = empty(&inputs.qkv, &[tokens, heads * head_dim], DType::BF16);
    let mut buffers = Buffers::default();
    let cache_at = cache.each_ref().map(|tensor| buffers.add(tensor));
    let output_at = buffers.add(&output);
    let mut scratch = |bytes: usize| buffers.add_scratch(&inputs.qkv.client, bytes);
    let q_at = scratch(2 * tokens * heads * head_dim);
    let partial_at = (splits > 1).then(|| scratch(4 * units * rows * splits * 16 * (head_dim + 2)));
    let places = Places::cached(&mut buffers, inputs);
    submit("attention_cached", &inputs.qkv.client, buffers, move |queue, buffers| {
        let (inputs, [k, v], q) = (places.of(buffers), cache_at.map(|at| buffers[at]), buffers[q_at]);
        extension.keep(queue, q, [k, v], &inputs)?;
        let (threads, shared) = geometry.decode(queue)?;
        let partial = partial_at.map_or(0, |partial| buffers[partial]);
        let arguments = Arguments::default().address(buffers[output_at]).address(partial);
        let arguments = arguments.address(queue.counters()).address(q).address(k).address(v);
        let arguments = arguments.address(inputs.first).int(length + time).int(time);
        let arguments = arguments.int(heads).int(kv_heads).int(slots).int(window).float(scale);
        let launch = Launch { grid: (splits, units, rows), block: (threads, 1), shared };
        queue.launch(source, "attention_decode", launch, arguments)
    });
    (output, cache)
}
