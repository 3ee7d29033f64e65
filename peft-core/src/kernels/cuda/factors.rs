//! The factors of low-rank terms as the products read them: in the activations' type, filled up and laid out so that thin
//! products of several maps are one.

use super::backend::{at, dense, dims, elementwise, empty};
use super::commands::{Arguments, Launch};
use super::cublaslt::Product;
use super::engine::{Buffers, submit};
use super::error::Fault;
use super::queue::Queue;
use crate::kernels::linear::{Factors as LowRank, MOST_JOINT, Part, RANK_STEP, Up};
use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;

/// Where a map's columns, ranks and `B` are among those of all.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// The first of its columns, and how many there are.
    pub start: usize,
    pub width: usize,
    /// The first of its ranks, and how many there are, without what fills them up.
    pub first: usize,
    pub rank: usize,
    /// Elements of the factors before its `B`.
    pub b: usize,
}

impl Place {
    /// Its rank, filled up.
    pub fn filled(&self) -> usize {
        self.rank.next_multiple_of(RANK_STEP)
    }
}

/// Where the maps' columns and ranks are in what lies side by side, and where their factors are in the activations' type:
/// `[A₁; A₂; …]` `[Σr, in]`, then each `s·B` `[out, r]`; or, where the terms go in joint products, in the rows of its map and
/// the columns of its rank, `[Σout, Σr]`, with zeros elsewhere.
#[derive(Clone)]
pub(super) struct Layout {
    pub places: Vec<Place>,
    pub inputs: usize,
    /// Σ out.
    pub out: usize,
    /// Σ r, each filled up.
    pub rank: usize,
    /// Elements of all factors.
    pub len: usize,
}

impl Layout {
    pub fn new(parts: &[Part<CubeTensor>], inputs: usize) -> Self {
        let (mut out, mut ranks) = (0, 0);
        let places = parts.iter().map(|part| {
            let width = dims(&part.weight).0;
            let rank = part.factors.as_ref().map_or(0, |factors| dims(&factors.a).0);
            let place = Place { start: out, width, first: ranks, rank, b: 0 };
            out += width;
            ranks += place.filled();
            place
        });
        let places: Vec<Place> = places.collect();
        // The Bs begin at a multiple of 256 bytes.
        let len = (ranks * inputs).next_multiple_of(128);
        let mut layout = Self { places, inputs, out, rank: ranks, len };
        let joint = layout.is_joint();
        for place in &mut layout.places {
            place.b = layout.len;
            layout.len += place.width * if joint { ranks } else { place.filled() };
        }
        layout
    }

    /// Whether the terms go in joint products.
    pub fn is_joint(&self) -> bool {
        self.rank <= MOST_JOINT
    }

    /// The terms that have products of their own. Where all terms go together they are one.
    pub fn groups(&self) -> Vec<Place> {
        match self.is_joint() {
            true => {
                let b = self.places.first().map_or(0, |place| place.b);
                vec![Place { start: 0, width: self.out, first: 0, rank: self.rank, b }]
            }
            false => self.places.iter().filter(|place| place.rank > 0).copied().collect(),
        }
    }
}

/// What a factor is worked out from, by the places of its buffers.
#[derive(Clone, Copy)]
pub(super) enum Origin {
    /// Nothing: zeros.
    Zeros,
    /// The matrix as it is.
    Matrix(usize),
    /// `[F B]·R − O`, with the columns of `F`.
    Core { b: usize, core: usize, frozen: Option<(usize, usize)>, offset: Option<usize> },
    /// `diag(outer)·B·diag(inner)`.
    Scaled { b: usize, outer: usize, inner: usize },
}

impl Origin {
    pub fn of(up: &Up<CubeTensor>, buffers: &mut Buffers) -> Self {
        match up {
            Up::Matrix(b) => Origin::Matrix(buffers.add_rows(b)),
            Up::Core { b, core, frozen, offset } => Origin::Core {
                b: buffers.add_rows(b),
                core: buffers.add_rows(core),
                frozen: frozen.as_ref().map(|frozen| (buffers.add_rows(frozen), dims(frozen).1)),
                offset: offset.as_ref().map(|offset| buffers.add_rows(offset)),
            },
            Up::Scaled { b, outer, inner } => Origin::Scaled {
                b: buffers.add_rows(b),
                outer: buffers.add_rows(outer),
                inner: buffers.add_rows(inner),
            },
        }
    }
}

/// A factor that is written in the activations' type.
pub(super) struct Cast {
    origin: Origin,
    /// Elements before the first row that it is written to.
    to: usize,
    /// Its rows, and those that are written, the others with zeros.
    rows: (usize, usize),
    /// Its columns.
    columns: usize,
    /// The first of these columns there, and how many there are.
    among: (usize, usize),
    scale: f32,
}

/// Words of the kernel's structure, and the places of two addresses among them.
const CAST_WORDS: usize = 11;
const FROM: usize = 0;
const TO: usize = 1;
/// Structures that the kernel takes.
const MOST_CASTS: usize = 6;

impl Cast {
    /// Those of all maps.
    pub fn all(parts: &[Part<CubeTensor>], layout: &Layout, buffers: &mut Buffers) -> Vec<Self> {
        let (inputs, joint) = (layout.inputs, layout.is_joint());
        let mut casts = Vec::with_capacity(2 * parts.len());
        for (part, place) in parts.iter().zip(&layout.places) {
            let low = part.factors.as_ref();
            if let Some(LowRank { a, .. }) = low {
                casts.push(Self {
                    origin: Origin::Matrix(buffers.add_rows(a)),
                    to: place.first * inputs,
                    rows: (place.rank, place.filled()),
                    columns: inputs,
                    among: (0, inputs),
                    scale: 1.0,
                });
            }
            let among = if joint { (place.first, layout.rank) } else { (0, place.filled()) };
            casts.push(Self {
                origin: low.map_or(Origin::Zeros, |LowRank { b, .. }| Origin::of(b, buffers)),
                to: place.b,
                rows: (place.width, place.width),
                columns: place.rank,
                among,
                scale: low.map_or(0.0, |low| low.scale),
            });
        }
        casts
    }

    fn words(&self, dtype: DType, buffers: &[u64], to: u64) -> [u64; CAST_WORDS] {
        let pair = |low: usize, high: usize| low as u64 | (high as u64) << 32;
        let optional = |at: Option<usize>| at.map_or(0, |at| buffers[at]);
        // From, core, frozen, its columns, offset, outer, inner.
        let (from, core, frozen, split, offset, outer, inner) = match self.origin {
            Origin::Zeros => (0, 0, 0, 0, 0, 0, 0),
            Origin::Matrix(b) => (buffers[b], 0, 0, 0, 0, 0, 0),
            Origin::Core { b, core, frozen, offset } => {
                let (frozen, split) = frozen.unzip();
                (buffers[b], buffers[core], optional(frozen), split.unwrap_or(0), optional(offset), 0, 0)
            }
            Origin::Scaled { b, outer, inner } => (buffers[b], 0, 0, 0, 0, buffers[outer], buffers[inner]),
        };
        [
            from,
            at(to, self.to, dtype),
            core,
            frozen,
            offset,
            outer,
            inner,
            pair(self.rows.0, self.rows.1),
            pair(self.columns, self.among.0),
            pair(self.among.1, split),
            u64::from(self.scale.to_bits()),
        ]
    }

    /// Enqueues them.
    pub fn enqueue(
        casts: &[Self],
        queue: &mut Queue,
        dtype: DType,
        buffers: &[u64],
        to: u64,
    ) -> Result<(), Fault> {
        let mut words = [0; MOST_CASTS * CAST_WORDS];
        for (slot, cast) in words.chunks_exact_mut(CAST_WORDS).zip(casts) {
            slot.copy_from_slice(&cast.words(dtype, buffers, to));
        }
        let (lanes, aligned) = (16 / dtype.size(), |address: u64| address.is_multiple_of(16));
        let in_pieces = |(cast, words): (&Self, &[u64])| {
            cast.among.1.is_multiple_of(lanes) && aligned(words[FROM]) && aligned(words[TO])
        };
        let vectors = casts.iter().zip(words.chunks_exact(CAST_WORDS)).all(in_pieces);
        let arguments = Arguments::default().structure(&words).int(usize::from(vectors));
        let most = casts.iter().map(|cast| cast.rows.1 * cast.among.1).max().unwrap_or(0);
        let of_block = 256 * if vectors { lanes } else { 1 };
        let grid = (most.div_ceil(of_block).min(1024), casts.len(), 1);
        let launch = Launch { grid, block: (256, 1), shared: 0 };
        queue.launch(elementwise(dtype), "cast_factors", launch, arguments)
    }
}

/// The factor that `up` stands for, in f32.
pub fn up_factor(up: &Up<CubeTensor>) -> CubeTensor {
    let (out, rank) = (dims(up.b()).0, dims(up.columns_like()).1);
    let factor = empty(up.b(), &[out, rank], DType::F32);
    let mut buffers = Buffers::default();
    let origin = Origin::of(up, &mut buffers);
    let cast = Cast { origin, to: 0, rows: (out, out), columns: rank, among: (0, rank), scale: 1.0 };
    let to = buffers.add(&factor);
    submit("up_factor", &factor.client, buffers, move |queue, buffers| {
        Cast::enqueue(&[cast], queue, DType::F32, buffers, buffers[to])
    });
    factor
}

/// A block of a matrix of f32 that is written elsewhere, times a scale.
#[derive(Clone, Copy)]
pub(super) struct Block {
    /// Elements before it.
    pub from: usize,
    pub rows: usize,
    pub columns: usize,
    pub scale: f32,
    /// The place of what gets it.
    pub to: usize,
}

/// Words of the kernel's structure for a block, and how many of them it takes.
const BLOCK_WORDS: usize = 3;
const MOST_BLOCKS: usize = 3;

impl Block {
    /// Writes blocks of the matrix at an address whose rows are `stride` apart.
    pub fn take(
        blocks: &[Self],
        queue: &mut Queue,
        buffers: &[u64],
        matrix: u64,
        stride: usize,
    ) -> Result<(), Fault> {
        let pair = |low: usize, high: u32| u64::from(low as u32) | u64::from(high) << 32;
        let mut words = [0; MOST_BLOCKS * BLOCK_WORDS];
        for (slot, block) in words.chunks_exact_mut(BLOCK_WORDS).zip(blocks) {
            let &Self { from, rows, columns, scale, to } = block;
            slot.copy_from_slice(&[buffers[to], pair(from, rows as u32), pair(columns, scale.to_bits())]);
        }
        let most = blocks.iter().map(|block| block.rows * block.columns).max().unwrap_or(0);
        let launch = Launch { grid: (most.div_ceil(256), blocks.len(), 1), block: (256, 1), shared: 0 };
        let arguments = Arguments::default().address(matrix).int(stride).structure(&words);
        queue.launch(elementwise(DType::F32), "take_blocks", launch, arguments)
    }
}

/// What stands for `B` trains: the gradient of the whole factor, and what it is passed on to.
pub(super) struct UpGradient {
    /// Where the factor's gradient is written, and the distance of its rows.
    pub whole: (usize, usize),
    pub origin: Origin,
    /// The gradients of what it is made of, as [`Up::trained`] has them.
    pub to: [Option<usize>; 2],
}

impl UpGradient {
    /// Passes the factor's gradient on.
    pub fn enqueue(&self, queue: &mut Queue, place: &Place, buffers: &[u64]) -> Result<(), Fault> {
        let ((whole, stride), Place { width, rank, .. }) = (self.whole, *place);
        let (whole, to) = (buffers[whole], self.to.map(|to| to.map(|to| buffers[to])));
        let dense = |m, n, k| dense(m, n, k, DType::F32);
        match self.origin {
            Origin::Zeros => Ok(()),
            Origin::Matrix(_) => {
                let Some(place) = self.to[0].filter(|to| buffers[*to] != whole) else { return Ok(()) };
                let block = Block { from: 0, rows: width, columns: rank, scale: 1.0, to: place };
                Block::take(&[block], queue, buffers, whole, stride)
            }
            // dB = G·R₂ᵀ with the rows of R that B's columns meet; dR = [F B]ᵀ·G.
            Origin::Core { b, core, frozen, .. } => {
                let split = frozen.map_or(0, |(_, columns)| columns);
                let own = rank - split;
                if let Some(db) = to[0] {
                    let product = Product { a: (false, stride), b: (true, rank), ..dense(width, own, rank) };
                    let core = at(buffers[core], split * rank, DType::F32);
                    queue.product(&product, 1.0, whole, core, 0.0, db, db)?;
                }
                let Some(dcore) = to[1] else { return Ok(()) };
                let rows = |b: u64, first: usize, count: usize| {
                    let product =
                        Product { a: (true, count), b: (false, stride), ..dense(count, rank, width) };
                    (product, b, at(dcore, first * rank, DType::F32))
                };
                let of_frozen = frozen.map(|(frozen, columns)| rows(buffers[frozen], 0, columns));
                for (product, b, to) in of_frozen.into_iter().chain([rows(buffers[b], split, own)]) {
                    queue.product(&product, 1.0, b, whole, 0.0, to, to)?;
                }
                Ok(())
            }
            Origin::Scaled { b, outer, inner } => {
                let arguments = Arguments::default().address(whole).int(stride).address(buffers[b]);
                let arguments = arguments.address(buffers[outer]).address(buffers[inner]);
                let arguments = arguments.address(to[0].unwrap_or(0)).address(to[1].unwrap_or(0));
                let grid = (width.div_ceil(32).max(rank.div_ceil(32)), 2, 1);
                let launch = Launch { grid, block: (32, 32), shared: 0 };
                let arguments = arguments.int(width).int(rank);
                queue.launch(elementwise(DType::F32), "scaled_gradients", launch, arguments)
            }
        }
    }
}
