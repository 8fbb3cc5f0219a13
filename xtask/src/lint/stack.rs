//! The stack of the BPF programs, computed from the object without a kernel.
//!
//! The verifier allows 512 bytes for a program and the functions that it calls, one within the other. Kernels before
//! 6.9 round each frame up to 32 bytes, an empty frame too (`check_max_stack_depth` in kernel/bpf/verifier.c). A frame
//! ends at the deepest offset from r10 that the function uses.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use object::{
    Object as _, ObjectSection as _, ObjectSymbol as _, RelocationTarget, SectionFlags, SymbolKind,
};

use crate::process::say;

/// Bytes that the deepest chain of calls of a program may take: 32 fewer than the verifier allows.
const MOST: u32 = 480;
/// Number of frames that the verifier allows (`MAX_CALL_FRAMES`).
const MOST_FRAMES: usize = 8;
/// Unit that the verifier rounds a frame up to, in bytes.
const UNIT: u32 = 32;

/// Bytes of an instruction.
const INSTRUCTION: u64 = 8;
const FRAME_POINTER: u8 = 10;

/// Checks the chains of calls of every program in `object`, and prints the deepest of each.
///
/// # Errors
/// When the object cannot be read, or a chain is too deep.
pub(super) fn check(object: &Path) -> Result<()> {
    let bytes = fs::read(object).with_context(|| format!("cannot read {}", object.display()))?;
    let functions = read(&bytes).with_context(|| object.display().to_string())?;
    let mut too_deep = Vec::new();
    for (at, function) in functions.iter().filter(|(_, function)| function.is_program) {
        let chain = deepest(&functions, *at, &mut Vec::new())?;
        let shown: Vec<_> = chain.frames.iter().map(|(name, bytes)| format!("{name} {bytes}")).collect();
        say(&format!("{}: {} bytes: {}", function.name, chain.bytes, shown.join(", ")));
        if chain.bytes > MOST || chain.frames.len() > MOST_FRAMES {
            too_deep.push(format!("{} ({} bytes)", function.name, chain.bytes));
        }
    }
    ensure!(
        too_deep.is_empty(),
        "more than {MOST} bytes of stack or {MOST_FRAMES} frames: {}; kernels 5.10 and 6.1 refuse more than 512",
        too_deep.join(", ")
    );
    Ok(())
}

/// Section and offset of a function.
type At = (usize, u64);

#[derive(Debug, Default)]
struct Function {
    name: String,
    /// Whether the kernel runs the function by itself.
    is_program: bool,
    /// Bytes between r10 and the deepest offset from it.
    frame: u32,
    calls: Vec<At>,
}

/// A function with the functions that it calls, one within the other, and the bytes that the verifier counts for them.
#[derive(Debug, Default)]
struct Chain {
    bytes: u32,
    /// Names and unrounded bytes of the frames.
    frames: Vec<(String, u32)>,
}

fn deepest(functions: &BTreeMap<At, Function>, at: At, above: &mut Vec<At>) -> Result<Chain> {
    let function = functions.get(&at).with_context(|| format!("a call leads to no function: {at:?}"))?;
    ensure!(!above.contains(&at), "{} calls itself", function.name);
    above.push(at);
    let mut below = Chain::default();
    for call in &function.calls {
        let chain = deepest(functions, *call, above)?;
        if chain.bytes > below.bytes {
            below = chain;
        }
    }
    above.pop();
    below.bytes += function.frame.max(1).next_multiple_of(UNIT);
    below.frames.insert(0, (function.name.clone(), function.frame));
    Ok(below)
}

fn read(bytes: &[u8]) -> Result<BTreeMap<At, Function>> {
    let file = object::File::parse(bytes).context("not an object file")?;
    let mut functions = BTreeMap::new();
    for symbol in file.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.size() > 0) {
        let Some(index) = symbol.section_index() else { continue };
        let section = file.section_by_index(index)?;
        let name = short(symbol.name()?);
        let code = section
            .data_range(symbol.address(), symbol.size())?
            .with_context(|| format!("{name} ends behind its section"))?;
        // The loader knows programs by their section; `.text` holds the functions that programs call.
        let is_program = section.name()? != ".text";
        let function = Function { name, is_program, ..walk(&file, &section, symbol.address(), code)? };
        functions.insert((index.0, symbol.address()), function);
    }
    ensure!(functions.values().any(|function| function.is_program), "there is no program in it");
    Ok(functions)
}

/// Returns the last part of a mangled path.
fn short(mangled: &str) -> String {
    let path = format!("{:#}", rustc_demangle::demangle(mangled));
    let path = path.split_once('<').map_or(path.as_str(), |(path, _)| path);
    path.trim_end_matches(':').rsplit("::").next().unwrap_or(path).to_owned()
}

/// Returns frame and calls of the function with the instructions `code`, which begins at `start` of its section.
fn walk(
    file: &object::File<'_>,
    section: &object::Section<'_, '_>,
    start: u64,
    code: &[u8],
) -> Result<Function> {
    ensure!(
        matches!(section.flags(), SectionFlags::Elf { sh_flags } if sh_flags & u64::from(object::elf::SHF_EXECINSTR) != 0),
        "a function in a section without code"
    );
    let relocations: BTreeMap<u64, RelocationTarget> =
        section.relocations().map(|(at, relocation)| (at, relocation.target())).collect();
    let mut function = Function::default();
    let mut stack_pointers = StackPointers::default();
    let mut instructions = code.as_chunks::<8>().0.iter().zip(0..);
    while let Some((bytes, number)) = instructions.next() {
        let instruction = Instruction::of(*bytes);
        let at = start + number * INSTRUCTION;
        if let Some(offset) = stack_pointers.follow(&instruction) {
            function.frame = function.frame.max(offset);
        }
        if instruction.is_wide() {
            ensure!(
                instruction.source != Instruction::FUNCTION_POINTER,
                "a function pointer: calls of it are not seen"
            );
            let _ = instructions.next();
        }
        if instruction.calls_function() {
            function.calls.push(match relocations.get(&at) {
                Some(RelocationTarget::Symbol(symbol)) => {
                    let symbol = file.symbol_by_index(*symbol)?;
                    let target = symbol.section_index().context("a call leads out of the object")?;
                    // A relocation names a function, or its offset in a section.
                    let inside = if symbol.kind() == SymbolKind::Section {
                        u64::try_from(i64::from(instruction.immediate) + 1)? * INSTRUCTION
                    } else {
                        0
                    };
                    (target.0, symbol.address() + inside)
                }
                Some(other) => bail!("a call with an unknown relocation: {other:?}"),
                None => {
                    let next = i64::try_from(at / INSTRUCTION)? + 1 + i64::from(instruction.immediate);
                    (section.index().0, u64::try_from(next)? * INSTRUCTION)
                }
            });
        }
    }
    Ok(function)
}

/// Fields of an instruction (RFC 9669) that matter here.
struct Instruction {
    code: u8,
    destination: u8,
    source: u8,
    offset: i16,
    immediate: i32,
}

impl Instruction {
    /// `BPF_PSEUDO_CALL`, in the source of a call.
    const PROGRAM_FUNCTION: u8 = 1;
    /// `BPF_PSEUDO_FUNC`, in the source of a wide load.
    const FUNCTION_POINTER: u8 = 4;

    const fn of([code, registers, o0, o1, i0, i1, i2, i3]: [u8; 8]) -> Self {
        Self {
            code,
            destination: registers & 0xf,
            source: registers >> 4,
            offset: i16::from_le_bytes([o0, o1]),
            immediate: i32::from_le_bytes([i0, i1, i2, i3]),
        }
    }

    /// Returns whether the instruction loads 64 bits from itself and the next one (`BPF_LD | BPF_IMM | BPF_DW`).
    const fn is_wide(&self) -> bool {
        self.code == 0x18
    }

    const fn calls_function(&self) -> bool {
        self.code == 0x85 && self.source == Self::PROGRAM_FUNCTION
    }
}

/// Registers that hold r10 with a constant added.
#[derive(Default)]
struct StackPointers {
    below: [Option<i32>; 16],
}

impl StackPointers {
    /// Returns the offset below r10 that an instruction accesses or computes.
    ///
    /// Instructions are followed in order, without jumps: the compiler makes each pointer where it needs it, by a copy
    /// and an addition.
    fn follow(&mut self, instruction: &Instruction) -> Option<u32> {
        let Instruction { code, destination, source, offset, immediate } = *instruction;
        self.below[usize::from(FRAME_POINTER)] = Some(0);
        let reached = match code & 7 {
            // BPF_LDX has its pointer in the source register, BPF_ST and BPF_STX in the destination register.
            1 => self.below[usize::from(source)].map(|below| below + i32::from(offset)),
            2 | 3 => self.below[usize::from(destination)].map(|below| below + i32::from(offset)),
            _ => None,
        };
        match (code, code & 7) {
            // BPF_ALU64 | BPF_MOV | BPF_X
            (0xbf, _) => self.below[usize::from(destination)] = self.below[usize::from(source)],
            // BPF_ALU64 | BPF_ADD | BPF_K
            (0x07, _) => {
                let pointer = self.below[usize::from(destination)].map(|below| below + immediate);
                self.below[usize::from(destination)] = pointer;
                return pointer.and_then(|below| u32::try_from(-below).ok());
            }
            // Any other instruction that writes a register: loads, arithmetic.
            (_, 0 | 1 | 4 | 7) => self.below[usize::from(destination)] = None,
            // A call.
            (0x85, _) => self.below[..6].fill(None),
            _ => {}
        }
        reached.and_then(|below| u32::try_from(-below).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALL: [u8; 8] = [0x85, 0, 0, 0, 1, 0, 0, 0];

    /// Returns the deepest offset that some instructions reach.
    fn frame(code: &[[u8; 8]]) -> u32 {
        let mut pointers = StackPointers::default();
        code.iter().filter_map(|bytes| pointers.follow(&Instruction::of(*bytes))).max().unwrap_or(0)
    }

    fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> [u8; 8] {
        let ([o0, o1], [i0, i1, i2, i3]) = (offset.to_le_bytes(), immediate.to_le_bytes());
        [code, source << 4 | destination, o0, o1, i0, i1, i2, i3]
    }

    #[test]
    fn a_frame_ends_at_the_deepest_offset() {
        assert_eq!(frame(&[instruction(0x7b, 10, 1, -8, 0), instruction(0x79, 2, 10, -24, 0)]), 24);
        assert_eq!(frame(&[instruction(0x7a, 10, 0, -40, 7)]), 40);
        // A pointer, for a helper or for another function.
        assert_eq!(frame(&[copy(2, 10), add(2, -600)]), 600);
        assert_eq!(frame(&[copy(6, 10), add(6, -64), copy(1, 6), add(1, -8)]), 72);
        assert_eq!(frame(&[copy(6, 10), add(6, -64), instruction(0x7b, 6, 1, -16, 0)]), 80);
        // Registers that no longer hold a stack pointer: loaded anew, or overwritten by a call.
        assert_eq!(frame(&[copy(1, 10), instruction(0x79, 1, 7, 0, 0), add(1, -600)]), 0);
        assert_eq!(frame(&[copy(1, 10), CALL, add(1, -600)]), 0);
        assert_eq!(frame(&[copy(6, 10), CALL, add(6, -600)]), 600);
    }

    fn copy(to: u8, from: u8) -> [u8; 8] {
        instruction(0xbf, to, from, 0, 0)
    }

    fn add(to: u8, bytes: i32) -> [u8; 8] {
        instruction(0x07, to, 0, 0, bytes)
    }

    fn functions(all: &[(u64, u32, &[u64])]) -> BTreeMap<At, Function> {
        all.iter()
            .map(|(at, frame, calls): &(u64, u32, &[u64])| {
                let calls = calls.iter().map(|call| (0, *call)).collect();
                ((0, *at), Function { name: at.to_string(), is_program: *at == 0, frame: *frame, calls })
            })
            .collect()
    }

    #[test]
    fn a_chain_is_the_sum_of_its_frames_rounded_up() {
        // The kernel counted 128 + 160 + 128 + 32 + 32 + 96.
        let all = functions(&[
            (0, 120, &[1]),
            (1, 144, &[2]),
            (2, 104, &[3, 6]),
            (3, 32, &[4]),
            (4, 0, &[5]),
            (5, 72, &[]),
            (6, 96, &[]),
        ]);
        let chain = deepest(&all, (0, 0), &mut Vec::new()).unwrap();
        assert_eq!(chain.bytes, 576);
        assert_eq!(
            chain.frames.iter().map(|(_, bytes)| *bytes).collect::<Vec<_>>(),
            [120, 144, 104, 32, 0, 72]
        );
    }

    #[test]
    fn a_function_that_calls_itself_and_one_that_is_not_there_are_errors() {
        assert!(error_of(&[(0, 8, &[1]), (1, 8, &[0])]).contains("calls itself"));
        assert!(error_of(&[(0, 8, &[1])]).contains("no function"));
    }

    fn error_of(all: &[(u64, u32, &[u64])]) -> String {
        deepest(&functions(all), (0, 0), &mut Vec::new()).unwrap_err().to_string()
    }

    #[test]
    fn names_are_the_last_part_of_a_path() {
        assert_eq!(short("connect4"), "connect4");
        let mangled = "_RINvNtNtNtCs26fJgMXxDo7_12proxy_common8datapath4edge5flows6recordNtNtCsfgaUF8HpULS_4vipr4maps4MapsEB15_";
        assert_eq!(short(mangled), "record");
    }
}
