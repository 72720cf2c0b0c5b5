/**
 * Every error that this package throws on purpose.
 *
 * This module owns the tree of errors and their codes. It must not know what causes them.
 */

/** The codes of {@link ProviderError}, for programs. */
export type ErrorCode =
  /** The caller asked for what cannot be. */
  | 'misuse'
  /** What a relay sent is no message of the protocol. */
  | 'malformed'
  /** There is no connection, or it was lost before the answer came. */
  | 'offline'
  /** The relay said no. */
  | 'refused'
  /** The storage of this device failed. */
  | 'store'

/** An error of this package; `message` is one line for people. */
export class ProviderError extends Error {
  override readonly name = 'ProviderError'

  /**
   * @param code For programs.
   * @param message For people.
   * @param rule With `refused` the relay's own code.
   */
  constructor(
    readonly code: ErrorCode,
    message: string,
    readonly rule: string = ''
  ) {
    super(message)
  }
}

/** Bytes that are no frame, with what is wrong about them. */
export const malformed = (message: string): ProviderError => new ProviderError('malformed', message)

/** A mistake of the caller. */
export const misuse = (message: string): ProviderError => new ProviderError('misuse', message)
